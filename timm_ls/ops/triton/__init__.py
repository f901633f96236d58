"""Kernels for CUDA devices, written in Triton: window attention without gathered keys, landmarks in one pass.

- `attention.py`: the implementation 'triton': what it takes, launches, the operator for graphs,
- `kernels.py`: the kernels, and what decides their speed,
- `landmarks.py`, `landmark_kernels.py`: the same for landmarks, on which `pool_tokens` decides (`merge.py`),
- `self_check.py`: whether the kernels are right on this device: asked before they are chosen.

They take float32 (as accurate as float32, unless torch is allowed TF32), bfloat16 and float16, heads of up to 128
channels, windows of up to 16 x 16, rows of a map, any size, first and second derivatives, `torch.compile`, and
`torch.export` where 'triton' is forced; NVIDIA's devices from compute capability 8.0 on. Everything else goes to plain
operations. Gradients have the same bits in every run.

What is known of them: values and gradients agree with the oracle to 1e-5 under Triton's interpreter and on an H200
(`MEASUREMENTS.md` has their speed there), and they compile for sm_80, sm_90 and sm_120 as
`tests/ops/test_triton_registers.py` says. They have run on no other GPU. So they check themselves on the user's device
before they are taken, and `python -m timm_ls.gpu_check` tells whoever has one how right and how fast they are there.
"""
