"""docs/adding-a-mixer.md is true: the mixer it shows obeys every law of test_mixers.py."""

import inspect
import re
from pathlib import Path

import pytest

from tests.laws import test_mixers
from tests.laws.mixers import small

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-mixer.md"
LAWS = [name for name in dir(test_mixers) if name.startswith("test_")]


@pytest.fixture(scope="module")
def average():
    """The page's class, under test as "average"; the configuration of another mixer serves it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(test_mixers.CLASSES, "average", names["Average"])
        patch.setattr(test_mixers, "small", lambda mixer, **fields: small("gla", **fields))
        yield "average"
    test_mixers.case.cache_clear()


@pytest.mark.parametrize("law", LAWS)
def test_the_worked_example_obeys(law, average):
    function = getattr(test_mixers, law)
    more = {"change": "NaN"} if "change" in inspect.signature(function).parameters else {}
    function(average, **more)
