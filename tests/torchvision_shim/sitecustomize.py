"""Test only: lets the published torchvision, a CUDA build, be imported beside a torch that has no CUDA.

Python imports this module at start when its folder is on PYTHONPATH. torchvision registers fake kernels for
operators that its library, which cannot load here, would have defined; defined first, without kernels,
they satisfy it. Resizing is done in Python, over torch's own operators.
"""

import torch

if torch.version.cuda is None:
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
