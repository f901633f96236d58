"""Kernels for CUDA devices, written in Triton: window attention without gathered keys, forward and backward.

| module | holds |
|---|---|
| `attention.py` | the implementation 'triton': what it takes, launches, the operator for graphs |
| `kernels.py` | the kernels, and what decides their speed |
"""
