"""Trees, affinities and predictions of your own images and sentences, on a page in the browser.

    python -m grootv.explorer

`views` has what the page shows, as functions from Python that need no browser: each returns a `View` with a figure and
the numbers behind it. The page itself is `page`, which needs Gradio (`pip install "grootv[explorer]"`).
"""
