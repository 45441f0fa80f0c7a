import datasets
import pytest

from compressllm.calibration.hub import C4, WikiText2, join_articles
from compressllm.core.errors import CalibrationError

ROWS = ["", " = First = \n", "", " Text . \n", " = = Part = = \n", " More . \n", "", " = Second = \n", " End . \n", ""]


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: records how it was asked, and answers with `rows` or raises `error`."""

    class Hub:
        asked, rows, error = (), ROWS, None

        def load(self, *args, **kwargs):
            self.asked = (*args, kwargs)
            if self.error:
                raise self.error
            return [{"text": row} for row in self.rows]

    fake = Hub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load)
    return fake


def test_articles_join_to_the_string_the_rows_join_to():
    articles = list(join_articles(ROWS))
    assert [article.split("\n")[0] for article in articles] == ["", " = First = ", " = Second = "]
    assert "\n\n".join(articles) == "\n\n".join(ROWS)
    assert list(join_articles([])) == []


@pytest.mark.parametrize(("split", "stored"), [("calibration", "train"), ("evaluation", "test")])
def test_wikitext2_asks_for_the_raw_set(hub, split, stored):
    assert "\n\n".join(WikiText2().texts(split)) == "\n\n".join(ROWS)
    assert hub.asked == ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": stored})


def test_c4_asks_for_the_first_shards_alone(hub):
    hub.rows = [f"page {i}" for i in range(1500)]
    assert list(C4().texts("calibration")) == hub.rows
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert hub.asked == ("allenai/c4", None, {"split": "train", "data_files": files})
    assert list(C4().texts("evaluation")) == [" ".join(hub.rows[:1100])]
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert hub.asked == ("allenai/c4", None, {"split": "validation", "data_files": files})


@pytest.mark.parametrize("source", [WikiText2(), C4()], ids=lambda source: type(source).__name__)
@pytest.mark.parametrize("error", [ConnectionError("no\n route"), ValueError("no\n route"), RuntimeError("no\n route")])
def test_offline_is_one_line_that_says_what_to_do(hub, source, error):
    hub.error = error
    with pytest.raises(CalibrationError) as caught:
        list(source.texts("evaluation"))
    assert "(no route); go online, set HF_HOME" in str(caught.value)
    assert "\n" not in str(caught.value)
