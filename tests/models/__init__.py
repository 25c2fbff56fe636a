"""Every family of Transformer that capture is tested with, tiny for the tests and in full for `make zoo`."""

from tests.models.family import Family
from tests.models.huggingface import HUGGING_FACE
from tests.models.own import OWN

ZOO: dict[str, Family] = {family.name: family for family in (*OWN, *HUGGING_FACE)}

__all__ = ["ZOO", "Family"]
