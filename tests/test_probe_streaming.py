"""`--max-memory`: patches read for each batch give what patches in memory give, and few are read at a time."""

from __future__ import annotations

import numpy as np
import pytest

from mefem_cli.errors import UsageError
from mefem_cli.evaluation import saved, streaming
from mefem_cli.evaluation.evaluate import ProbeOptions, read_features
from mefem_cli.evaluation.job import Job
from mefem_cli.probes import _grid, attentive
from mefem_cli.stores.features import FeatureStore, FeatureWriter

FACES, TOKENS, WIDTH = 700, 4, 8


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(FACES, WIDTH))
    patches = features[:, None] + rng.normal(size=(FACES, TOKENS, WIDTH))
    path = tmp_path_factory.mktemp("stream") / "a.h5"
    with FeatureWriter(path, {}, WIDTH, num_patches=TOKENS) as writer:
        writer.append([f"{row:04x}" for row in range(FACES)], features, features, patches)
        writer.finish({"value": features[:, 0], "subject": np.array([f"p{n // 2}" for n in range(FACES)], object)}, {})
    return FeatureStore.open(path)


@pytest.mark.parametrize("features", ["patches", "patches+cls"])
def test_streamed_tokens_index_as_an_array_does(store, features):
    rows = np.random.default_rng(1).permutation(FACES)[:300]
    held = streaming.open_features(store, features, rows, max_memory=1.0)
    streamed = streaming.open_features(store, features, rows, max_memory=0.0)
    assert isinstance(held, np.ndarray) and isinstance(streamed, streaming.StreamedTokens)
    assert (streamed.shape, streamed.dtype, len(streamed)) == (held.shape, held.dtype, len(held))
    for chosen in (np.array([7, 3, 3, 299]), np.arange(0), np.arange(300)):
        np.testing.assert_array_equal(streamed[chosen], held[chosen])
    np.testing.assert_array_equal(streamed[5], held[5])
    np.testing.assert_array_equal(held, read_features(store, features, rows))


def test_the_limit_counts_the_bytes_of_the_rows(store):
    rows = np.arange(FACES)
    size = FACES * TOKENS * WIDTH * 2 / streaming.GIB
    assert isinstance(streaming.open_features(store, "patches", rows, size * 1.01), np.ndarray)
    assert not isinstance(streaming.open_features(store, "patches", rows, size * 0.99), np.ndarray)
    assert isinstance(streaming.open_features(store, "cls", rows, 0.0), np.ndarray)  # vectors always fit
    assert streaming.free_memory() > 1 << 20


def test_a_streamed_probe_gives_the_same_scores_and_head_and_holds_few_rows(store, monkeypatch, tmp_path):
    options = {"head": "attentive", "bootstraps": 100, "device": "cpu", "folds": 2}
    recipe = {"attentive": attentive.Options(learning_rates="1e-2", epochs=2)}
    read_at_once = []
    read_rows = FeatureStore.read_rows

    def spy(self, name, rows):
        if name == "patches":
            read_at_once.append(len(np.arange(FACES)[rows]))
        return read_rows(self, name, rows)

    found, heads = [], []
    for max_memory in (None, 0.0):
        monkeypatch.setattr(FeatureStore, "read_rows", spy)
        read_at_once.clear()
        job = Job.prepare([store], ["value"], ProbeOptions(**options, max_memory=max_memory))
        results = job.run(recipe)
        saved.save(tmp_path / f"{max_memory}.head", job, results, recipe, {})
        found.append(results.scores[0].predictions.output)
        heads.append(saved.load(tmp_path / f"{max_memory}.head"))
    assert max(read_at_once) <= max(_grid.EVALUATION_ROWS, saved.BLOCK_ROWS) < FACES
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(heads[0].state["head.query"], heads[1].state["head.query"])
    np.testing.assert_allclose(heads[0].far, heads[1].far)


def test_a_negative_limit_is_refused():
    with pytest.raises(UsageError, match="--max-memory -1"):
        ProbeOptions(max_memory=-1.0)
