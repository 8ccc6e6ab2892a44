"""Threads and devices of the models in this process, in one place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_threads = 0


def pin_threads(count: int) -> None:
    """Let every model of this process use `count` threads. Call before stages are set up.

    0: as OMP_NUM_THREADS says, else all cores.
    """
    global _threads
    import cv2
    import torch

    _threads = count or int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count() or 1
    torch.set_num_threads(_threads)
    cv2.setNumThreads(_threads)


def onnx_session(path: Path) -> Any:
    """An onnxruntime session on the GPU if the installed build has one, else on `pin_threads`'
    number of cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    known = onnxruntime.get_available_providers()
    providers = [
        name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in known
    ]
    return onnxruntime.InferenceSession(str(path), options, providers=providers)


def torch_device(name: str) -> str:
    """`auto` → cuda where there is one, else cpu; anything else as given."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
