"""Probe heads against scikit-learn, and the trained ones against slow references written here."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch.nn import functional

from mefem_cli.errors import UsageError
from mefem_cli.probes import Fold, _grid, attentive, knn, linear, mlp, standardise

ROWS, WIDTH, TOKENS = 120, 10, 5


def learnable(kind: str, shape: tuple[int, ...] = (WIDTH,)) -> tuple[np.ndarray, np.ndarray]:
    """Return features and targets: numbers, or three classes."""
    rng = np.random.default_rng(0)
    features = rng.normal(1.0, 2.0, size=(ROWS, *shape)).astype(np.float32)
    signal = features.reshape(ROWS, -1, WIDTH).mean(axis=1)
    target = signal @ rng.normal(size=WIDTH) + 0.5 * rng.normal(size=ROWS)
    if kind == "classification":
        target = np.digitize(target, np.quantile(target, [0.3, 0.7])).astype(np.int64)
    return features, target


def fold_of(kind: str, shape: tuple[int, ...] = (WIDTH,)) -> Fold:
    """Return a fold of learnable rows: 90 to learn from, 30 to predict."""
    features, target = learnable(kind, shape)
    train, test = np.arange(0, 90), np.arange(90, ROWS)
    classes = 3 if kind == "classification" else 0
    return Fold(features, train, test, target[train], np.arange(90) % 5, classes, device="cpu")


def inner_splits(fold):
    for held_out in range(5):
        yield np.flatnonzero(fold.inner != held_out), np.flatnonzero(fold.inner == held_out)


@pytest.mark.parametrize("width", [WIDTH, 200])  # more features than rows takes the other route through the algebra
def test_ridge_equals_scikit_learn(width):
    fold = fold_of("regression", (width // WIDTH, WIDTH))
    fold = Fold(fold.features.reshape(ROWS, width), fold.train, fold.test, fold.target, fold.inner)
    errors = []
    for penalty in linear.PENALTIES:
        model = make_pipeline(StandardScaler(), Ridge(penalty))
        fits = [
            (model.fit(fold.train_features[a], fold.target[a]).predict(fold.train_features[b]) - fold.target[b]) ** 2
            for a, b in inner_splits(fold)
        ]
        errors.append(np.concatenate(fits).sum())
    best = linear.PENALTIES[int(np.argmin(errors))]
    expected = make_pipeline(StandardScaler(), Ridge(best)).fit(fold.train_features, fold.target)
    fitted = linear.fit_predict(fold, linear.Options())
    assert fitted.chosen == {"penalty": best}
    np.testing.assert_allclose(fitted.output, expected.predict(fold.test_features), rtol=1e-6)


def test_logistic_equals_scikit_learn():
    fold = fold_of("classification")
    for strength in (1e-3, 0.1, 1.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-8, max_iter=1000))
        expected = model.fit(fold.train_features, fold.target).predict_proba(fold.test_features)
        found = linear.logistic_path(fold.train_features, fold.target, fold.test_features, [strength], 3)[0]
        np.testing.assert_allclose(found, expected, atol=1e-3)  # ours stops at a gradient of 1e-4
    fitted = linear.fit_predict(fold, linear.Options())
    assert (fitted.output.argmax(axis=1) == learnable("classification")[1][fold.test]).mean() > 0.8


def test_logistic_of_many_rows_chooses_its_penalty_on_some_and_learns_from_all(monkeypatch):
    rng = np.random.default_rng(0)
    rows, width = 3000, 12
    features = rng.normal(2, 3, size=(rows, width)).astype(np.float16)
    logits = features.astype(float) @ rng.normal(size=width) / 6
    target = (logits - logits.mean() + rng.logistic(size=rows) > 0).astype(np.int64)
    inner = np.where(np.arange(2500) % 5 == 0, 0, -1)  # one part to choose on, as a data set's own
    fold = Fold(features, np.arange(2500), np.arange(2500, rows), target[:2500], inner, 2)
    everyone = linear.fit_predict(fold, linear.Options())
    monkeypatch.setattr(linear, "CHOICE_ROWS", 400)
    monkeypatch.setattr(linear, "MANY_VALUES", 1)  # single precision
    seen = []
    path = linear.logistic_path
    monkeypatch.setattr(linear, "logistic_path", lambda *args: seen.append(args) or path(*args))
    found = linear.fit_predict(fold, linear.Options())
    ((train_x, train_y, valid_x, *_),) = seen
    assert (len(train_x), len(train_y), len(valid_x)) == (400, 400, 500)
    held_out = {row.tobytes() for row in features[:2500][inner == 0].astype(np.float32)}
    assert not held_out & {row.tobytes() for row in train_x}
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / found.chosen["penalty"], tol=1e-8, max_iter=1000))
    expected = model.fit(features[:2500].astype(float), target[:2500]).predict_proba(features[2500:].astype(float))
    np.testing.assert_allclose(found.output, expected, atol=2e-3)
    assert np.abs(found.output - everyone.output).max() < 0.05  # 400 rows choose nearly the same penalty


def test_logistic_without_a_class_in_the_training_rows():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(20, 3)), rng.normal(size=(4, 3))
    two = linear.logistic_path(train, np.repeat([0, 2], 10), test, [1.0], 3)[0]
    assert (two[:, 1] == 0).all()
    np.testing.assert_allclose(two.sum(axis=1), 1)
    one = linear.logistic_path(train, np.full(20, 2), test, [1.0], 3)[0]
    np.testing.assert_array_equal(one, np.eye(3)[[2] * 4])


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_knn_equals_scikit_learn(kind, count):
    fold = fold_of(kind)
    model = KNeighborsClassifier if kind == "classification" else KNeighborsRegressor
    expected = make_pipeline(StandardScaler(), Normalizer(), model(count, metric="cosine", algorithm="brute"))
    expected.fit(fold.train_features, fold.target)
    predict = expected.predict_proba if kind == "classification" else expected.predict
    fitted = knn.fit_predict(fold, knn.Options(str(count)))
    assert fitted.chosen == {"neighbors": count}
    np.testing.assert_allclose(fitted.output, predict(fold.test_features), atol=1e-9)


def test_knn_chooses_k_inside():
    fold = fold_of("regression")
    errors = {}
    for count in (1, 5, 20):
        model = make_pipeline(StandardScaler(), Normalizer(), KNeighborsRegressor(count, metric="cosine"))
        fits = [
            (model.fit(fold.train_features[a], fold.target[a]).predict(fold.train_features[b]) - fold.target[b]) ** 2
            for a, b in inner_splits(fold)
        ]
        errors[count] = np.concatenate(fits).sum()
    assert knn.fit_predict(fold, knn.Options("20,1,5")).chosen == {"neighbors": min(errors, key=errors.get)}


def test_standardise_ignores_constant_features():
    train, test = standardise(np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 7.0]]))
    np.testing.assert_allclose(train, [[-1, 0], [1, 0]])
    np.testing.assert_allclose(test, [[0, 0]])


def textbook_head(
    pooler: attentive.AttentivePooler, g: int, tokens: torch.Tensor, attention_heads: int
) -> torch.Tensor:
    """Head g of a grid as the method states it, step by step: keys and values of every token, then attention."""
    batch, num_tokens, width = tokens.shape
    d = width // attention_heads
    x = functional.layer_norm(tokens, [width], pooler.token_gain[g], pooler.token_shift[g], eps=1e-6)
    keys = functional.linear(x, pooler.key[g], torch.full([width], 0.7, dtype=x.dtype))  # any key bias: no effect
    values = functional.linear(x, pooler.value[g], pooler.value_bias[g])
    gathered = torch.zeros(batch, width, dtype=x.dtype)
    for b in range(batch):
        for h in range(attention_heads):
            part = slice(h * d, (h + 1) * d)
            logits = torch.stack([pooler.query[g, part] @ keys[b, t, part] for t in range(num_tokens)]) / math.sqrt(d)
            gathered[b, part] = torch.softmax(logits, dim=0) @ values[b, :, part]
    q = pooler.query[g] + gathered
    normed = functional.layer_norm(q, [width], pooler.norm_gain[g], pooler.norm_shift[g], eps=1e-6)
    hidden = functional.gelu(functional.linear(normed, pooler.expand[g].T, pooler.expand_bias[g]))
    q = q + functional.linear(hidden, pooler.contract[g].T, pooler.contract_bias[g])
    return functional.linear(q, pooler.readout[g].T, pooler.readout_bias[g])


@pytest.mark.parametrize(("width", "attention_heads"), [(128, 2), (10, 1)])
def test_attentive_equals_the_textbook_head(width, attention_heads):
    torch.manual_seed(0)
    pooler = attentive.AttentivePooler(3, width, 2, torch.Generator().manual_seed(0)).double()
    for parameter in pooler.parameters():  # norms, biases and heads that differ
        parameter.data += 0.3 * torch.randn_like(parameter)
    tokens = torch.randn(2, TOKENS, width, dtype=torch.float64)
    weights = torch.randn(3, 2, 2, dtype=torch.float64)
    output = pooler(tokens)
    expected = torch.stack([textbook_head(pooler, g, tokens, attention_heads) for g in range(3)])
    torch.testing.assert_close(output, expected)
    parameters = list(pooler.parameters())
    gradients = torch.autograd.grad((output * weights).sum(), parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), parameters))


def test_hidden_layer_equals_torch_layers():
    head = mlp.HiddenLayer(2, WIDTH, 7, 3, torch.Generator().manual_seed(0))
    x = torch.randn(4, WIDTH)
    for g in range(2):
        hidden = functional.gelu(x @ head.first[g] + head.first_bias[g])
        torch.testing.assert_close(head(x)[g], hidden @ head.second[g] + head.second_bias[g])


def test_stacked_adamw_equals_the_published_update():
    torch.manual_seed(0)
    grid = [(1e-2, 0.5), (1e-3, 0.0)]
    stack = [torch.nn.Parameter(torch.randn(2, 3, 4)), torch.nn.Parameter(torch.randn(2, 4))]
    slow = [parameter.detach().double() for parameter in stack]
    moments = [(torch.zeros_like(one), torch.zeros_like(one)) for one in slow]
    optimiser = _grid.StackedAdamW(stack, grid)
    for step in range(1, 5):
        gradients = [torch.randn_like(parameter) for parameter in stack]
        for parameter, gradient in zip(stack, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimiser.step(0.5)
        for index, gradient in enumerate(gradients):
            for g, (rate, decay) in enumerate(grid):
                first, second = moments[index][0][g], moments[index][1][g]
                first.mul_(0.9).add_(0.1 * gradient[g])
                second.mul_(0.999).add_(0.001 * gradient[g].double() ** 2)
                update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                decayed = decay if index == 0 else 0.0  # the bias does not decay
                slow[index][g] -= 0.5 * rate * (update + decayed * slow[index][g])
    for parameter, expected in zip(stack, slow, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("module", "shape"), [(mlp, (WIDTH,)), (attentive, (TOKENS, WIDTH))])
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_heads_in_a_grid_do_not_touch_each_other(module, shape, kind, monkeypatch):
    """Each head of a grid learns what it learns alone."""
    seen, refits = [], []
    train = _grid._Trainer.train

    def spy(self, grid, rows, epochs, valid=None):
        head, losses = train(self, grid, rows, epochs, valid)
        if valid is not None:
            alone = [train(self, [one], rows, epochs, valid)[1][:, 0] for one in grid]
            seen.append((losses, np.stack(alone, axis=1)))
        else:
            refits.append((grid, int(rows.sum()), epochs))
        return head, losses

    monkeypatch.setattr(_grid._Trainer, "train", spy)
    options = module.Options(learning_rates="1e-3,1e-2", weight_decays="0,1", epochs=3)
    fitted = module.fit_predict(fold_of(kind, shape), options)
    together, alone = seen[0]
    assert together.shape == (3, 4)
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    epoch, best = np.unravel_index(alone.argmin(), alone.shape)
    pairs = [(1e-3, 0.0), (1e-3, 1.0), (1e-2, 0.0), (1e-2, 1.0)]
    found = (fitted.chosen["learning_rate"], fitted.chosen["weight_decay"], fitted.chosen["epochs"])
    assert found == (*pairs[best], epoch + 1)
    assert refits == [([pairs[best]], 90, epoch + 1)]


@pytest.mark.parametrize(("module", "shape"), [(mlp, (WIDTH,)), (attentive, (TOKENS, WIDTH))])
def test_trained_heads_learn_and_repeat(module, shape):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(400, *shape)).astype(np.float16)
    target = features.astype(float).reshape(400, -1, WIDTH)[..., 0].mean(axis=1) * 30 + 500
    train, test = np.arange(300), np.arange(300, 400)
    fold = Fold(features, train, test, target[train], np.arange(300) % 5, seed=3, device="cpu")
    options = module.Options(learning_rates="3e-3,1e-2", epochs=15)
    first, second = module.fit_predict(fold, options), module.fit_predict(fold, options)
    np.testing.assert_array_equal(first.output, second.output)
    assert not np.array_equal(first.output, module.fit_predict(replace(fold, seed=4), options).output)
    assert 1 - ((first.output - target[test]) ** 2).mean() / target[test].var() > 0.8


@pytest.mark.parametrize("module", [attentive, mlp])
def test_by_default_20_heads_are_trained(module):
    options = module.Options()
    recipe = _grid.Recipe(options.learning_rates, options.weight_decays, options.epochs, options.head_batch)
    assert len({*recipe.rates}) * len({*recipe.decays}) == 20


def test_schedule_warms_up_and_ends_at_zero():
    factors = [_grid.schedule(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[100] == pytest.approx(0)


@pytest.mark.parametrize(
    ("module", "changes", "words"),
    [
        (mlp, {"hidden": 0}, "--hidden 0"),
        (mlp, {"epochs": 0}, "--epochs 0"),
        (attentive, {"head_batch": 0}, "--head-batch 0"),
        (attentive, {"learning_rates": "fast"}, "--learning-rates fast"),
        (attentive, {"learning_rates": "0"}, "--learning-rates"),
        (mlp, {"weight_decays": "-1"}, "--weight-decays"),
        (knn, {"neighbors": "five"}, "--neighbors five"),
        (knn, {"neighbors": "0"}, "--neighbors 0"),
    ],
)
def test_senseless_options_are_refused(module, changes, words):
    with pytest.raises(UsageError, match=words):
        module.Options(**changes)


def test_training_ends_where_the_inner_fold_no_longer_gains(monkeypatch):
    rng = np.random.default_rng(0)
    noise = Fold(
        rng.normal(size=(200, WIDTH)), np.arange(160), np.arange(160, 200), rng.normal(size=160), np.arange(160) % 5
    )
    epochs = []
    evaluate = _grid._Trainer.evaluate
    monkeypatch.setattr(_grid._Trainer, "evaluate", lambda *args: epochs.append(1) or evaluate(*args))
    chosen = mlp.fit_predict(replace(noise, device="cpu"), mlp.Options(epochs=200)).chosen
    assert len(epochs) == chosen["epochs"] + _grid.PATIENCE


@pytest.mark.parametrize(
    ("module", "shape"), [(linear, (WIDTH,)), (linear, (200,)), (mlp, (WIDTH,)), (attentive, (TOKENS, WIDTH))]
)
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_a_kept_head_reads_what_the_fitted_one_read(module, shape, kind):
    fold = (
        fold_of(kind) if shape == (WIDTH,) else fold_of(kind, (shape[0] // WIDTH, WIDTH) if shape == (200,) else shape)
    )
    if shape == (200,):
        fold = replace(fold, features=fold.features.reshape(ROWS, 200))
    options = module.Options() if module is linear else module.Options(learning_rates="1e-2", epochs=3)
    fitted = module.fit_predict(fold, options)
    np.testing.assert_allclose(module.predict(fitted.state, fold.features[fold.test]), fitted.output, rtol=1e-5)
    assert np.ptp(fitted.output) > 0.1


def test_kept_logistic_regression_of_two_and_of_absent_classes_gives_scikit_learns_probabilities():
    fold = fold_of("classification")
    for absent in (0, 1, 2):
        target = np.where(fold.target == absent, (absent + 1) % 3, fold.target)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8, max_iter=1000))
        expected = model.fit(fold.train_features, target).predict_proba(fold.test_features)
        found = linear.logistic_path(fold.train_features, target, fold.test_features, [0.1], 3)[0]
        np.testing.assert_allclose(np.delete(found, absent, axis=1), expected, atol=1e-3)
        assert (found[:, absent] == 0).all()


def test_attention_is_the_share_of_each_token():
    """By hand: the softmax of q . (W LN(x)) / sqrt(d) of each attention head, averaged over these."""
    torch.manual_seed(0)
    pooler = attentive.AttentivePooler(2, 128, 1, torch.Generator().manual_seed(0)).double()
    for parameter in pooler.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    tokens = torch.randn(3, TOKENS, 128, dtype=torch.float64)
    shares = pooler.shares(tokens)
    for g in range(2):
        x = functional.layer_norm(tokens, [128], pooler.token_gain[g], pooler.token_shift[g], eps=1e-6)
        keys = functional.linear(x, pooler.key[g]).unflatten(2, (2, 64))  # [B, T, H, d]
        logits = torch.einsum("hd,bthd->bth", pooler.query[g].view(2, 64), keys) / 8
        torch.testing.assert_close(shares[g], logits.softmax(dim=1).mean(dim=2))


def test_the_test_fold_comes_with_what_the_head_looked_at():
    fold = fold_of("regression", (TOKENS, WIDTH))
    fitted = attentive.fit_predict(fold, attentive.Options(learning_rates="3e-2", epochs=5))
    pooler = attentive.AttentivePooler(1, WIDTH, 1, torch.Generator())
    pooler.load_state_dict({name: torch.from_numpy(fitted.state[f"head.{name}"])[None] for name in pooler.state_dict()})
    expected = pooler.shares(torch.from_numpy(fold.features[fold.test]))[0]
    np.testing.assert_allclose(fitted.attention, expected.detach().numpy(), rtol=1e-4)
    np.testing.assert_allclose(fitted.attention.sum(axis=1), 1, rtol=1e-5)
    assert np.ptp(fitted.attention) > 0.02
