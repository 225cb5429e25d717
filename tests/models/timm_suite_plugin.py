"""pytest plugin under which timm's own test_models.py tests the models of this package, and no others."""

import timm

import grootv  # noqa: F401 (registers the models)

SIZES = timm.list_models(["grootv_*", "vmamba_*"])


def list_models(
    filter: str | list[str] = "",
    module: str | list[str] = "",
    pretrained: bool = False,
    exclude_filters: str | list[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """Takes the place of `timm.list_models`, by which that file chooses the models of each test."""
    if filter or pretrained:  # lists of other families, and of models with hosted weights
        return []
    # The tests of configurations, which ask for tags, run on the meta device: all sizes are cheap there.
    return SIZES if include_tags else ["grootv_nano", "vmamba_nano"]


timm.list_models = list_models
