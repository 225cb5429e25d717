"""What the explorer shows, as functions that return a `grootv.explorer.view.View`. None of them needs a browser.

from grootv.explorer import views

view = views.plot_tree("photograph.jpg", metric="cosine")
view.save("tree.png")
"""

from . import affinity, compare, dense, language, model, tree
from .affinity import plot_affinity
from .compare import plot_comparison
from .dense import plot_dense
from .language import plot_language
from .model import plot_model
from .tree import plot_tree

__all__ = ["SPECS", "plot_affinity", "plot_comparison", "plot_dense", "plot_language", "plot_model", "plot_tree"]

SPECS = {spec.name: spec for spec in (tree.SPEC, affinity.SPEC, model.SPEC, compare.SPEC, dense.SPEC, language.SPEC)}
"""The views by name, in the order of the page."""
