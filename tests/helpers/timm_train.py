"""`torchrun timm_train.py train.py ARGS...`: timm's script where it stumbles, in processes on a CPU and with Pillow 13.

It hands DistributedDataParallel its device, which that refuses unless it is a GPU. Its `rand-m9-mstd0.5-inc1` keeps no
bits of some images, which are black then; Pillow 13 refuses to.
"""
import runpy
import sys

import torch
from PIL import Image, ImageOps

ddp, posterize = torch.nn.parallel.DistributedDataParallel, ImageOps.posterize
torch.nn.parallel.DistributedDataParallel = lambda module, device_ids=None, **kwargs: ddp(module, **kwargs)
ImageOps.posterize = lambda image, bits: posterize(image, bits) if bits else Image.new(image.mode, image.size)

if __name__ == '__main__':
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
