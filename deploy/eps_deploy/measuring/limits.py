"""How far from float32 each precision may be: what is normal for it, with room, and no more.

They are there to catch a mistake (a wrong scale, a saturated layer, swapped channels), whose logits
are off by as much as they are large. Whether a precision is good enough is not said here, but by
the accuracy on the whole test part.

Measured against torch in float32: 5,000 test images of Fashion-MNIST on a compact network (depth
56, width 8, 11 blocks left) and its baseline of 27 blocks, 359 test images of digits on a compact
network (depth 110, width 16, 18 blocks left) and its baseline of 54; int8 calibrated on 512 images,
"minmax", with true Q/DQ arithmetic. The worst of the four:

| precision | largest difference / largest logit | same class |
|---|---|---|
| fp32 | 4.3e-7 | 100 % |
| fp16 (rounded to float16 between layers, computed in float32) | 1.1e-3 | 99.96 % |
| bf16 (in torch) | 2.5e-2 | 99.74 % |
| int8 | 6.4e-2 (1.3e-1 when calibrated on 100 images) | 99.26 % |
| int8-fp16 | 6.5e-2 | 99.22 % |

TF32 was not measured: it rounds operands to as many bits as float16 has, so it gets that limit.
No torch here: servers check their engines too.
"""

from __future__ import annotations

# Largest difference of two logits, over the largest magnitude among the reference's logits.
PARITY_LIMITS = {
    "fp32": 1e-4,
    "tf32": 5e-3,
    "fp16": 5e-3,
    "bf16": 0.1,
    "int8": 0.25,
    "int8-fp16": 0.25,
}
# Share of images of the same class, over a whole test part: on a few dozen images one that lies
# between two classes would decide.
AGREEMENT_LIMITS = {
    "fp32": 0.999,
    "tf32": 0.995,
    "fp16": 0.995,
    "bf16": 0.98,
    "int8": 0.95,
    "int8-fp16": 0.95,
}
