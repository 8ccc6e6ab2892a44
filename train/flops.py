"""Model FLOPs utilisation: the share of a GPU's peak speed that the UNet's operations reach."""

from __future__ import annotations

import json
from functools import cache
from typing import Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.training import Part, TrainConfig
from model.consistentid import BaseModels, ConsistentID, predict_noise
from model.spec import TOKEN_LIMIT, Mode, ModelSpec

# Dense operations in bf16 or fp16, 1e12/s, of the vendor's data sheets, by the whole name of the
# GPU: other variants, and parts of a GPU (MIG), have other peaks.
_PEAK_TFLOPS: Final = {
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA L40S": 362,
}


def sample_flops(config: TrainConfig, spec: ModelSpec, base: BaseModels) -> int:
    """Returns the floating-point operations of the UNet with the adapter's attention, forward and
    backward, for one sample. What is computed twice to save memory doesn't count twice.
    """
    unet = json.dumps(dict(base.unet.config))
    side = config.resolution // base.vae_factor
    return _count(unet, spec, config.model.mode, config.trained_parts, side)


@cache
def _count(
    unet_config: str, spec: ModelSpec, mode: Mode, parts: tuple[Part, ...], side: int
) -> int:
    """Counts on torch's meta device, which computes no values, in one to four seconds. side: of the
    latents.
    """
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(json.loads(unet_config))
        unet.requires_grad_(False)
        ConsistentID(spec, unet, mode).train_only(parts)
        added = {}
        if spec.two_text_encoders:
            times = 6 * unet.config.addition_time_embed_dim
            pooled = torch.empty(1, unet.config.projection_class_embeddings_input_dim - times)
            added = {"pooled": pooled, "time_ids": torch.empty(1, 6)}
        states = torch.empty(1, TOKEN_LIMIT + spec.num_tokens, spec.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            predicted, _ = predict_noise(
                unet,
                torch.empty(1, unet.config.in_channels, side, side),
                torch.empty(1, dtype=torch.long),
                states.requires_grad_(not {"projector", "facial_encoder"}.isdisjoint(parts)),
                **added,
            )
            torch.autograd.backward(predicted.sum())
    return int(counter.get_total_flops())


def peak_flops(device: str, precision: str) -> float:
    """Returns the peak of a GPU in operations a second, by its name; 0.0 if it isn't listed, and
    for float32.
    """
    return 1e12 * _PEAK_TFLOPS.get(device, 0) if precision != "no" else 0.0
