"""placeholder until h3 merges"""

from stages.record import Measures


def measure(image, labels, face):
    return Measures(
        sharpness=1.0, brightness=0.5, clipped=0.0, yaw=0.0, pitch=0.0, roll=0.0, occlusion=0.0, hash="0" * 64
    )
