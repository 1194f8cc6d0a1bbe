"""What our classes refuse of what diffusers' tests try: Class::test, as a shell pattern, and the reason in a sentence."""

from __future__ import annotations

CACHES = "caches hook the forward of each block, which the path with a condition does not call: enable_cache is refused"
PROCESSORS = "only CogVideoX's own attention processors have an effect: set_attn_processor refuses others"
PROMPTS = "a prompt that is longer than the text window is refused instead of cut"

REFUSALS = {
    "Test[SC]*PyramidAttentionBroadcast::*": CACHES,
    "Test[SC]*Cache::*": CACHES,
    "TestRealGeneralPyramidAttentionBroadcast::*": CACHES,
    "TestRealGeneral*Cache::*": CACHES,
    "Test[SC]*Attention::test_attention_processor_dict": PROCESSORS,
    "Test[SC]*Attention::test_attention_processor_count_mismatch_raises_error": PROCESSORS,
    "TestRealGeneralPipeline::test_inference_batch_consistent": PROMPTS,
    "TestRealGeneralPipeline::test_inference_batch_single_identical": PROMPTS,
}
