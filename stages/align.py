"""Similarity transforms from a face's five landmarks to the templates of face networks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stages.record import Face

Matrix = npt.NDArray[np.float64]

# mean landmarks of FFHQ's alignment at 512 × 512, from facexlib's restoration helper
FFHQ_512 = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
# ArcFace's template at 112 × 112 (insightface.utils.face_align.arcface_dst)
ARCFACE_112 = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


def similarity_transform(face: Face, template: npt.NDArray[np.float64]) -> Matrix:
    """Returns the (2, 3) matrix of the least-squares similarity transform (rotation, scale, shift)
    from the face's landmarks to `template` (5, 2).

    Closed form in complex numbers: minimises |a·p + b - q|² over complex a and b (Umeyama 1991, in
    the plane).
    """
    points = np.array(face.landmarks, np.float64)
    source = points[:, 0] + 1j * points[:, 1]
    target = template[:, 0] + 1j * template[:, 1]
    centred = source - source.mean()
    power = float((np.abs(centred) ** 2).sum())
    scale = (np.conj(centred) @ (target - target.mean())) / max(power, 1e-12)
    shift = target.mean() - scale * source.mean()
    return np.array([[scale.real, -scale.imag, shift.real], [scale.imag, scale.real, shift.imag]])
