import numpy as np
import pytest

from cascade.diffusion.grids import Chosen, EvenLogSNR, Karras, OnTable, Quadratic, Uniform
from cascade.diffusion.process import Cosine, LinearVP
from cascade.published.schedulers import Respaced

GRIDS = [Uniform(), Quadratic(), EvenLogSNR(), Karras(), OnTable(), OnTable(spacing="leading")]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_runs_down_to_zero_in_the_steps_asked_for(grid):
    times = np.asarray(grid(9, Cosine()))
    assert times.shape == (10,) and times[-1] == 0 and 0.85 < times[0] <= 1
    assert np.all(np.diff(times) < 0)


def test_chosen_entries_stand_where_those_of_a_table_do():
    spaced = OnTable()(4, Cosine())
    np.testing.assert_array_equal(Chosen(chosen=(999, 749, 499, 249))(4, Cosine()), spaced)
    np.testing.assert_allclose(Chosen(chosen=(899, 9))(2, Cosine()), [0.9, 0.01, 0])


def test_uniform_and_quadratic_are_what_they_say():
    np.testing.assert_allclose(Uniform()(4, Cosine()), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(Quadratic()(4, Cosine()), [1, 0.5625, 0.25, 0.0625, 0])


@pytest.mark.parametrize("schedule", [Cosine(), Cosine(shift=-3.0), LinearVP()])
def test_the_schedule_has_the_log_snrs_a_grid_is_even_in(schedule):
    logsnr = schedule.logsnr(EvenLogSNR(first=-8.0, last=9.0)(6, schedule))[:-1]
    np.testing.assert_allclose(logsnr, np.linspace(-8, 9, 6), atol=0.01)


def test_karras_is_the_published_formula():
    times = Karras()(18, Cosine())
    noise = np.exp(-Cosine().logsnr(times)[:-1] / 2)
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(noise, expected, rtol=0.005)


@pytest.mark.parametrize("grid", [EvenLogSNR(), Karras()])
def test_a_grid_stays_within_a_schedule_that_ends_early(grid):
    schedule = Cosine(logsnr_min=-6.0, logsnr_max=3.0)
    times = np.asarray(grid(8, schedule))
    # The last evaluation is at the schedule's clean end, t=0, to which the last step then returns.
    np.testing.assert_allclose(times[[0, -2, -1]], [1, 0, 0], atol=1e-6)
    assert np.all(np.diff(times[:-1]) < 0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Respaced(name="smart50").check(32), "steps must be 50 on the grid smart50, got 3"),
        (lambda: OnTable(entries=10).check(11), "1..10"),
        (lambda: EvenLogSNR(first=3.0, last=-3.0), "EvenLogSNR.first"),
        (lambda: Karras(last=90.0), "Karras.first"),
        (lambda: Karras(rho=0.0), "Karras.rho"),
        (lambda: Chosen(chosen=(5, 5)), r"Chosen.chosen must fall within 999..0, got \(5, 5\)"),
        (lambda: Chosen(chosen=(1000, 5)), "Chosen.chosen"),
        (lambda: Chosen(chosen=()), "Chosen.chosen"),
        (lambda: Chosen(chosen=(9, 5)).check(3), "steps must be as many as chosen, 2, got 3"),
    ],
)
def test_mistakes_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_grid_has_one_that_takes_any_number_of_steps():
    for grid in GRIDS:
        assert grid.of_any_length == grid
    fixed = Respaced(name="smart27")
    fixed.of_any_length.check(26)
    assert fixed.of_any_length == OnTable() and fixed.steps == 27
    with pytest.raises(ValueError, match="steps must be 27"):
        fixed.check(26)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_of_no_steps_is_refused(grid):
    with pytest.raises(ValueError, match="steps must be"):
        grid.check(0)
