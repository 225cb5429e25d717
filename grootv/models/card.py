"""The card of a model on a hub: what its README says, which timm writes."""

from typing import Any

__all__ = ["model_card"]

_USAGE = """
This model needs the package `grootv`, whose import makes it known to timm.

```python
import grootv, timm

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
```
"""

# What each family is, and the paper to cite.
_FAMILIES = {
    "GrootV": (
        "A GrootV vision backbone, which scans its feature maps along minimum spanning trees "
        "([paper](https://arxiv.org/abs/2406.02395)).",
        """@inproceedings{xiao2024grootvl,
  title={GrootVL: Tree Topology is All You Need in State Space Model},
  author={Xiao, Yicheng and Song, Lin and Huang, Shaoli and Wang, Jiangshan and Song, Siyuan and Ge, Yixiao and Li, Xiu
    and Shan, Ying},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}""",
    ),
    "VMamba": (
        "A VMamba vision backbone, which scans its feature maps row by row, column by column, and both backwards "
        "([paper](https://arxiv.org/abs/2401.10166)).",
        """@inproceedings{liu2024vmamba,
  title={VMamba: Visual State Space Model},
  author={Liu, Yue and Tian, Yunjie and Zhao, Yuzhong and Yu, Hongtian and Xie, Lingxi and Wang, Yaowei and Ye, Qixiang
    and Jiao, Jianbin and Liu, Yunfan},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}""",
    ),
}


def model_card(repo_id: str, family: str = "GrootV") -> dict[str, Any]:
    """What `timm.models.push_to_hf_hub` takes as `model_card`: without it, the README would show how to load a model of
    timm, which fails for everyone who has not imported `grootv`.

        timm.models.push_to_hf_hub(model, "name/model", model_card=grootv.model_card("name/model"))

    Args:
        repo_id: Where the model is pushed to, "name/model".
        family: What it is: "GrootV" or "VMamba".

    Returns:
        The tags, description, usage and citation. Add `license` (timm writes apache-2.0 without it) and `details`, such
        as `{"Dataset": "imagenet-1k"}`, of your own.

    Raises:
        ValueError: an unknown family.
    """
    if family not in _FAMILIES:
        raise ValueError(f"family must be one of {tuple(_FAMILIES)}, got {family!r}")
    description, citation = _FAMILIES[family]
    return {
        "library_name": "grootv",
        "tags": ["image-classification", "timm", family.lower()],
        "description": description,
        "usage": _USAGE.format(repo_id=repo_id),
        "citation": citation,
    }
