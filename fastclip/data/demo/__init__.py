"""The embedded data set: rendered scenes with exact captions, and real handwritten digits. No network, no download.

`scenes` says what is in a picture, `render` draws it, `captions` describes it, `digits` enlarges the real digits,
`samples` numbers all of it, `write` puts it into shards. Generator version 1 is frozen: its pixels and captions are
pinned by tests.
"""

from fastclip.data.demo.write import GENERATOR_VERSION, write_demo

__all__ = ["GENERATOR_VERSION", "write_demo"]
