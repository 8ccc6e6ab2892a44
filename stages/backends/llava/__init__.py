"""The backend `llava`: a vision-language model in the worker."""

from stages.backends.llava.captioner import Llava

__all__ = ["Llava"]
