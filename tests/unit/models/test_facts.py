import json
from pathlib import Path

import pytest

from compressllm.core.errors import CompressError
from compressllm.core.pattern import NM
from compressllm.models.facts import FILE_NAME, Facts, LinearFacts, read_facts


def test_facts_survive_the_disk(tmp_path: Path) -> None:
    facts = Facts(written_by="0", linears={"a": LinearFacts(pattern="2:4", shape=(8, 4))}, masks_sha256="ab")
    facts.write(tmp_path)
    assert read_facts(tmp_path) == facts
    assert facts.patterns == {"a": NM(2, 4)}


@pytest.mark.parametrize("pattern", [None, 7, "3:2", ["2:4"]])
def test_a_pattern_that_is_none_is_refused_in_one_line(tmp_path: Path, pattern: object) -> None:
    content = {"written_by": "0", "linears": {"a": {"pattern": pattern, "shape": [8, 4]}}}
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(CompressError) as caught:
        read_facts(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_their_place_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(CompressError, match=r"compressllm\.json: is no regular file"):
        read_facts(tmp_path)
