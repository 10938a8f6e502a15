import gc
import weakref
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfactory_ray.data.readers import open_source
from fedfactory_ray.data.transforms import to_tensor
from fedfactory_ray.generation import training
from fedfactory_ray.generation.edm import SIGMA_DATA, sample_sigma
from fedfactory_ray.generation.module import pack
from fedfactory_ray.generation.sampling import Drawing, image_noise
from fedfactory_ray.generation.training import TrainingStep, make_accelerator, train_denoiser, update_average
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.schedule import warmup_cosine
from fedfactory_ray.settings.data import DataConfig
from fedfactory_ray.settings.sections import GeneratorConfig, SamplerConfig

CPU = torch.device("cpu")
TINY = {"channels": (8, 16), "min_steps": 30, "max_steps": 30, "batch_size": 16}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first precision of a process; no test is to inherit another's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny(**settings: object) -> GeneratorConfig:
    return GeneratorConfig.model_validate(TINY | settings)


@cache
def class_images(label: int = 3, n: int = 40) -> Tensor:
    source = open_source(DataConfig(source="digits"))
    return torch.from_numpy(source.images("train", np.flatnonzero(source.labels("train") == label)[:n]))


def train(config: GeneratorConfig, seed: int = 0, images: Tensor | None = None) -> tuple[list[TrainingStep], Denoiser]:
    *progress, denoiser = train_denoiser(class_images() if images is None else images, config, CPU, seed)
    assert isinstance(denoiser, Denoiser)
    steps = [report for report in progress if isinstance(report, TrainingStep)]
    assert len(steps) == len(progress)
    return steps, denoiser


@pytest.fixture(scope="module")
def trained() -> Denoiser:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(tiny(prediction="gaussian", components=16))[1]


def loss_of(denoiser: Denoiser) -> float:
    """Loss on the training images, at fixed noise."""
    data = denoiser.standardise(to_tensor(class_images()).repeat(5, 1, 1, 1))
    draw = torch.Generator().manual_seed(0)
    sigma = sample_sigma(len(data), -0.8, 1.2, draw)
    with torch.no_grad():
        return float(denoiser.loss(data, sigma, torch.randn(data.shape, generator=draw)))


# Training


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"prediction": "image"},
        {"prediction": "gaussian", "components": 16, "min_steps": 100, "max_steps": 100},
        {"augment": "dihedral"},
        {"patch": 2, "attention_levels": (1,), "dropout": 0.1},
    ],
    ids=str,
)
def test_training_lowers_the_loss(variant: dict[str, object]) -> None:
    config = tiny(learning_rate=5e-3, precision="fp32", **variant)
    untrained = Denoiser(config, 1, 8).eval()
    untrained.fit_statistics(to_tensor(class_images()))
    progress, denoiser = train(config)
    assert loss_of(denoiser) < 0.99 * loss_of(untrained)
    assert not denoiser.training
    assert progress[-1].step == progress[-1].steps == config.max_steps
    assert all(0 < report.loss < 100 for report in progress)


@pytest.mark.parametrize("symmetries", ["none", "flip", "dihedral"])
def test_the_network_learns_from_data_of_the_deviation_it_is_preconditioned_for(
    symmetries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirrored image less the unmirrored mean image would not be centred: `standardise` belongs before `augment`."""
    seen: list[Tensor] = []
    loss = Denoiser.loss

    def watched(self: Denoiser, data: Tensor, *others: Tensor) -> Tensor:
        seen.append(data)
        return loss(self, data, *others)

    monkeypatch.setattr(Denoiser, "loss", watched)
    train(tiny(augment=symmetries, min_steps=3, max_steps=3, batch_size=400))
    assert torch.cat(seen).square().mean().sqrt().item() == pytest.approx(SIGMA_DATA, rel=0.05)


def test_training_is_a_function_of_its_seed() -> None:
    config = tiny(augment="flip", min_steps=10, max_steps=10)
    first, again, other = (pack(train(config, seed)[1], half=False) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_training_does_not_depend_on_what_the_process_did_before() -> None:
    config = tiny(prediction="gaussian", components=16, min_steps=10, max_steps=10)
    torch.manual_seed(123)
    first = pack(train(config)[1], half=False)
    torch.manual_seed(456)
    torch.randn(1000)
    np.random.seed(9)
    train(tiny(min_steps=3, max_steps=3), 5, class_images(7))
    assert pack(train(config)[1], half=False) == first


@pytest.mark.parametrize("at_once", [1, 5, 16])
def test_a_batch_in_parts_gives_its_gradient(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", -1.0)  # every step tells its loss, on a busy machine too
    whole, parts = (
        train(tiny(augment="flip", min_steps=4, max_steps=4, precision="fp32", images_at_once=n))[0]
        for n in (None, at_once)
    )
    assert len(whole) == 4
    assert [step.loss for step in parts] == pytest.approx([step.loss for step in whole], rel=1e-4)


def test_no_more_images_than_told_pass_through_the_network_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    loss = Denoiser.loss
    monkeypatch.setattr(Denoiser, "loss", lambda self, data, *more: seen.append(len(data)) or loss(self, data, *more))
    train(tiny(min_steps=2, max_steps=2, images_at_once=6))
    assert seen == [6, 6, 4] * 2


def test_training_follows_the_images() -> None:
    config = tiny(min_steps=5, max_steps=5)
    assert pack(train(config, 1, class_images(5))[1], half=False) != pack(train(config, 1)[1], half=False)


def test_a_module_holds_the_statistics_of_its_class(trained: Denoiser) -> None:
    images = to_tensor(class_images())
    torch.testing.assert_close(trained.mean, images.mean(0))
    assert trained.standardise(images).square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("prediction", ["residual", "gaussian"])
def test_classes_of_a_few_images_train(n: int, prediction: str) -> None:
    _, denoiser = train(tiny(min_steps=3, max_steps=3, prediction=prediction), 0, class_images()[:n])
    assert all(torch.isfinite(tensor).all() for tensor in denoiser.state_dict().values())


def test_a_diverging_loss_is_told_with_a_remedy() -> None:
    with pytest.raises(FloatingPointError, match=r"lower generator\.learning_rate"):
        train(tiny(learning_rate=1e30, grad_clip=1e30, warmup=0.0, min_steps=8, max_steps=8))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100_000), st.floats(0.1, 500), st.integers(1, 512), st.integers(1, 500), st.integers(0, 5000))
def test_steps_follow_the_size_of_the_class_within_bounds(
    images: int, epochs: float, batch_size: int, least: int, more: int
) -> None:
    config = GeneratorConfig(epochs=epochs, batch_size=batch_size, min_steps=least, max_steps=least + more)
    steps = config.steps(images)
    assert least <= steps <= least + more
    if least < steps < least + more:
        assert abs(steps - epochs * images / batch_size) <= 0.5
    assert config.steps(images + 100) >= steps


def test_the_steps_of_the_class_are_trained() -> None:
    config = tiny(epochs=3.0, batch_size=10, min_steps=1, max_steps=100)
    progress, _ = train(config)
    assert progress[-1].step == progress[-1].steps == config.steps(40) == 12


def test_a_launchers_variables_do_not_make_training_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator(CPU, "fp32")
    assert (accelerator.num_processes, accelerator.device.type) == (1, "cpu")


def test_a_finished_training_leaves_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client trains module after module; a cycle of references would keep each until Python's collector runs."""
    networks: list[weakref.ref[Denoiser]] = []
    fit_statistics = Denoiser.fit_statistics

    def watched(self: Denoiser, images: Tensor) -> None:
        networks.append(weakref.ref(self))
        fit_statistics(self, images)

    Denoiser(tiny(), 1, 8)  # the first import of diffusers keeps frames of whoever imports, in errors that it caught
    monkeypatch.setattr(Denoiser, "fit_statistics", watched)
    gc.collect()
    gc.disable()
    try:
        training = train_denoiser(class_images(), tiny(precision="bf16", min_steps=2, max_steps=2), CPU, 0)
        *_, denoiser = training
        assert len(networks) == 1
        del training
        assert networks[0]() is None
        average = weakref.ref(denoiser)
        del denoiser, _
        assert average() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_modules_are_float32_whatever_they_were_trained_in(precision: str) -> None:
    _, denoiser = train(tiny(precision=precision, min_steps=3, max_steps=3))
    assert {tensor.dtype for tensor in denoiser.state_dict().values()} == {torch.float32}
    assert all(weights.is_leaf and not weights.requires_grad for weights in denoiser.parameters())


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.9999), st.integers(0, 10_000), st.floats(-5, 5), st.floats(-5, 5))
def test_weights_are_averaged_with_a_decay_that_ramps_up(decay: float, step: int, old: float, new: float) -> None:
    averaged, current = [torch.tensor([old])], [torch.tensor([new])]
    update_average(averaged, current, decay, step)
    effective = min(decay, (1 + step) / (10 + step)) if step else 0.0  # the first step's weights as they are
    assert averaged[0].item() == pytest.approx(effective * old + (1 - effective) * new, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.floats(0, 0.99))
def test_the_learning_rate_rises_to_its_peak_and_falls_towards_zero(steps: int, warmup: float) -> None:
    shares = [warmup_cosine(step, steps, warmup) for step in range(steps)]
    peak = int(np.argmax(shares))
    assert max(shares) == pytest.approx(1)
    assert all(0 < share <= 1 for share in shares)
    assert (np.diff(shares[: peak + 1]) > 0).all()
    assert (np.diff(shares[peak:]) <= 1e-12).all()
    assert peak + 1 == max(1, min(steps, round(warmup * steps)))


# Drawing


def draw(
    denoiser: Denoiser, n: int, seed: int = 5, batch_size: int = 6, solver: str = "dpmpp", precision: str = "fp32"
) -> np.ndarray:
    config = SamplerConfig.model_validate({"solver": solver, "evaluations": 5})
    return Drawing(denoiser, config, batch_size, CPU, precision).draw(n, seed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("solver", ["dpmpp", "heun"])
def test_drawing_is_a_function_of_the_seed(trained: Denoiser, solver: str, precision: str) -> None:
    first, again, other = (draw(trained, 10, seed, 6, solver, precision) for seed in (1, 1, 2))
    assert first.shape == (10, 8, 8, 1)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 6, 7])
def test_the_first_images_do_not_depend_on_how_many_are_drawn(trained: Denoiser, n: int, precision: str) -> None:
    most = draw(trained, 14, precision=precision)
    assert np.array_equal(draw(trained, n, precision=precision), most[:n])


def test_drawing_ignores_and_keeps_the_processs_random_state(trained: Denoiser) -> None:
    torch.manual_seed(1)
    first, after = draw(trained, 4), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert np.array_equal(draw(trained, 4), first)


def test_all_images_differ(trained: Denoiser) -> None:
    images = draw(trained, 40)
    assert len({image.tobytes() for image in images}) == 40


def test_noise_belongs_to_the_image_and_not_to_its_place_in_a_batch(trained: Denoiser) -> None:
    six, ten = draw(trained, 12, batch_size=6), draw(trained, 12, batch_size=10)
    # Kernels may round differently for another batch size, by a grey level, but the images are the same.
    assert np.abs(six.astype(int) - ten.astype(int)).max() <= 1


def test_noise_of_an_image_is_its_own_and_standard_normal() -> None:
    noise = torch.stack([image_noise(7, index, (3, 16, 16)) for index in range(50)])
    assert torch.equal(image_noise(7, 31, (3, 16, 16)), noise[31])
    assert not torch.equal(noise[0], image_noise(8, 0, (3, 16, 16)))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    similarity = torch.corrcoef(noise.flatten(1)) - torch.eye(50)
    assert similarity.abs().max() < 0.2


def test_drawn_images_look_like_their_class(trained: Denoiser) -> None:
    """Nearer to the class's mean image than to those of most other digits."""
    drawn = draw(trained, 40).mean(0)
    distances = [np.abs(drawn - class_images(y).numpy().mean(0)).mean() for y in range(10)]
    assert int(np.argmin(distances)) == 3
