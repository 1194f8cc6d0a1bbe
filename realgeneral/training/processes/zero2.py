"""DeepSpeed ZeRO-2: gradients and optimizer states are shared out over the processes, weights are whole in each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from realgeneral.errors import UsageError
from realgeneral.settings.train import TrainConfig

# what a DeepSpeed file says under "zero_optimization": what the tests run
KEYS = {"stage", "reduce_bucket_size", "allgather_bucket_size"}


def zero_settings(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration of a run: its file, and what the run's own options say.

    Raises:
        UsageError: DeepSpeed is not installed, or the file holds anything but settings of ZeRO-2.
    """
    path = config.deepspeed_config
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"engine deepspeed needs a JSON file in --deepspeed-config, got {path!r}: {error}") from None
    zero = settings.get("zero_optimization") if isinstance(settings, dict) and len(settings) == 1 else None
    if not isinstance(zero, dict) or set(zero) != KEYS or zero["stage"] != 2 or {*map(type, zero.values())} != {int}:
        raise UsageError(
            f"{path} must hold zero_optimization alone, of stage 2, with whole numbers for {sorted(KEYS)} (batch size, "
            f"precision, clipping and optimizer are options of train), got {json.dumps(settings)[:300]}"
        )
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"engine deepspeed needs the package deepspeed (pip install 'realgeneral[deepspeed]'), got: {error}"
        ) from None
    return {
        **settings,
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
    }


def bucket_bytes(config: TrainConfig) -> int:
    """Bytes of the float32 gradients that DeepSpeed collects before it sends them: one buffer, allocated whole."""
    return 4 * int(zero_settings(config)["zero_optimization"]["reduce_bucket_size"])


class ZeroOptimizer:
    """A DeepSpeed engine as the trainer's optimizer: whole tensors in its state, and one norm for all processes.

    Args:
        settings: From `zero_settings`.
        model: The model.
        parameters: Its trained parameters, float32; they become views of one tensor.
        optimizer: An optimizer over them in one group; it keeps this process' part of them and of its states.

    Attributes:
        engine: To be called in place of the model.
    """

    def __init__(
        self, settings: dict[str, Any], model: nn.Module, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        import deepspeed

        self.parameters, self.inner = parameters, optimizer
        self.engine, self.zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The group whose learning rate is set."""
        return self.inner.param_groups

    def backward(self, loss: Tensor) -> None:
        """Gradients of a micro-step, added to this process' part of them."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def norm(self) -> Tensor:
        """Norm of the gradients before `step` clips them, NaN if one of them is not finite."""
        norm = self.zero.scaled_global_norm()
        return norm.masked_fill(norm < 0, torch.nan)  # -1 is its sign for that

    def step(self) -> None:
        """Clip, update this process' part of the weights, send it to the others."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: `step` has done it."""

    def state_dict(self) -> dict[str, Any]:
        """As the inner optimizer's over whole parameters, on the CPU; all processes must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        own = self.inner.state_dict()
        names = [name for name in own["state"][0] if name != "step"]
        state = {
            index: {
                "step": own["state"][0]["step"].clone(),  # one tensor for all would count up once for each
                **{name: safe_get_full_optimizer_state(parameter, name).cpu() for name in names},
            }
            for index, parameter in enumerate(self.parameters)
        }
        return {"state": state, "param_groups": [{**own["param_groups"][0], "params": list(state)}]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take this process' part of whole states; settings are those of this run."""
        from deepspeed.utils import safe_set_full_optimizer_state

        (flat,) = self.inner.param_groups[0]["params"]
        for name, value in saved["state"][0].items():
            self.inner.state[flat][name] = value if name == "step" else torch.zeros_like(flat)
        # else done after the first step: only then DeepSpeed expects states
        self.zero._lazy_init_hp_params_optimizer_state()
        for parameter, (_, values) in zip(self.parameters, sorted(saved["state"].items()), strict=True):
            for name, value in values.items():
                if name != "step":
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
