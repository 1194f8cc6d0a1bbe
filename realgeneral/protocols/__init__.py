"""The paper's evaluation: customization on a DreamBench-shaped folder, canny and depth on a COCO-shaped one."""
