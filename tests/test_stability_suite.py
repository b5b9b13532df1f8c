"""The suite around the probes: isolation, resuming, verdicts, report and command."""

import dataclasses
import html
import json
import logging
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
import metaopt.stability
from experiments import __main__ as door
from experiments import backend, subjects
from experiments.console import UsageError
from metaopt.optimizers import SmallFC
from metaopt.stability import field, records, references, results, suite
from metaopt.stability.coverage_probe import CoverageProbe
from metaopt.stability.horizon import HorizonProbe
from metaopt.stability.lyapunov import LyapunovProbe
from metaopt.stability.probe import Level, Verdict
from metaopt.stability.problems import Bowl
from metaopt.stability.references import __main__ as references_command
from metaopt.stability.report import page, write_report
from metaopt.stability.reverse import ReverseProbe
from metaopt.stability.subject import subject
from metaopt.stability.suite import PROBES, QUICK, run_suite
from metaopt.weights import save_weights
from tests.stability_probes import CALLS, Crashing, Inapplicable, Second, Third, Told

EVERY = (Told(), Second(Level.WARN), Third(Level.FAIL), Crashing(), Inapplicable())


@pytest.fixture(autouse=True)
def calls():
    noted: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: noted.append(record.getMessage())
    CALLS.setLevel(logging.INFO)
    CALLS.addHandler(handler)
    yield noted
    CALLS.removeHandler(handler)


def run(*probes, optimizer=None, **options):
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    return run_suite(optimizer, name="a <name>", probes=probes, **options)


def levels(report):
    return [result.verdict.level for result in report.results]


@pytest.mark.parametrize("kind", ["tx", "factory", "learned", "subject"])
def test_the_call_makes_the_report_again(kind):
    rule, tx = SmallFC(step_size=0.1), optax.sgd(0.1)
    theta = rule.init_theta(jax.random.key(0))
    factory = lambda num_steps: optax.sgd(1.0 / num_steps)
    first = {"tx": tx, "factory": factory, "learned": rule, "subject": field.broken()}
    options: dict = {"name": "a 'name'", "horizon": 7}
    if kind == "learned":
        options["theta"] = theta
    if kind == "subject":
        first["subject"], options = field.references()["adam"], {}
    probes = [Told(value=0.25), Second(Level.WARN)]
    report = run_suite(first[kind], probes=probes, seed=3, **options)
    scope = {"theta": theta, "subject": first["subject"], "tx": tx, "factory": factory}
    scope |= {"metaopt": metaopt, "Told": Told, "Second": Second, "Level": Level}
    assert "seed=3" in report.command and "suite='quick'" in report.command
    call = re.sub(r"<(Level.\w+): \d>", r"\1", report.command)
    again = eval(call, scope)
    wanted, found = report.as_json(), again.as_json()
    for one in (*wanted["probes"], *found["probes"]):
        del one["seconds"]
    wanted["command"] = found["command"] = ""
    assert found == wanted


def test_a_crash_is_reported_and_the_rest_goes_on(calls):
    report = run(Crashing(), Told())
    assert levels(report) == [Level.ERROR, Level.PASS]
    assert calls == ["S4", "S1"]
    crash = report.as_json()["probes"][0]
    assert crash["reason"] == "The probe crashed with RuntimeError: out of <luck>"
    assert 'raise RuntimeError("out of' in crash["traceback"]
    assert report.level is Level.WARN


def test_a_crash_of_the_verdict_rule_is_a_crash_too():
    class Unjust(Told):
        def judge(self, measured, references):
            return 1 / 0

    assert levels(run(Unjust())) == [Level.ERROR]


def test_what_does_not_apply_is_not_measured(calls):
    report = run(Inapplicable(), Told())
    assert levels(report) == [Level.NA, Level.PASS]
    assert calls == ["S1"]
    assert report.level is Level.PASS


@pytest.mark.parametrize(
    "found, overall",
    [
        ([Level.PASS, Level.PASS], 0),
        ([Level.PASS, Level.NA], 0),
        ([Level.PASS, Level.WARN], 1),
        ([Level.PASS, Level.ERROR], 1),
        ([Level.ERROR, Level.FAIL], 2),
        ([Level.FAIL, Level.WARN, Level.NA], 2),
        ([Level.NA], 1),
        ([], 1),
    ],
)
def test_the_overall_level_is_the_worst_one(found, overall):
    assert int(results.worst(found)) == overall


def test_a_second_run_takes_measurements_from_the_folder(calls, tmp_path):
    first = run(Told(), Second(), Crashing(), out=tmp_path)
    again = run(Told(), Second(), Crashing(), out=tmp_path)
    assert calls == ["S1", "S2", "S4", "S4"]
    assert again.as_json()["probes"][:2] == first.as_json()["probes"][:2]
    np.testing.assert_array_equal(
        again.results[0].measured["words"], first.results[0].measured["words"]
    )


def test_an_interrupted_run_goes_on_where_it_stopped(calls, tmp_path):
    class Interrupting(Second):
        def measure(self, subject, key):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Told(), Interrupting(), out=tmp_path)
    run(Told(), Second(), out=tmp_path)
    assert calls == ["S1", "S2"]


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"optimizer": optax.sgd(0.2)},
        {"probe": Told(value=0.6)},
        {"version": "0.0.0"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_record_is_measured_anew(changed, calls, tmp_path, monkeypatch):
    run(Told(), out=tmp_path)
    changed = dict(changed)
    if "version" in changed:
        other = changed.pop("version")
        monkeypatch.setattr(records, "version", lambda: other)
    run(changed.pop("probe", Told()), out=tmp_path, **changed)
    assert calls == ["S1", "S1"]


def test_a_damaged_file_is_measured_anew(calls, tmp_path):
    run(Told(), out=tmp_path)
    path = tmp_path / "measured" / "S1.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert levels(run(Told(), out=tmp_path)) == [Level.PASS]
    assert calls == ["S1", "S1"]


def test_arrays_that_need_pickle_are_refused():
    class Odd(Told):
        def measure(self, subject, key):
            return {"x": np.array([{}], object)}

    (result,) = run(Odd()).results
    assert result.verdict.level is Level.ERROR
    assert "'x' is not one" in result.verdict.reason


def digest(optimizer, **options):
    return records.digest(subject(optimizer, **options))


def test_the_digest_sees_schedules_and_constants():
    schedule = optax.linear_schedule
    assert digest(optax.sgd(schedule(1, 0, 9))) == digest(optax.sgd(schedule(1, 0, 9)))
    assert digest(optax.sgd(schedule(1, 0, 9))) != digest(optax.sgd(schedule(1, 0, 8)))
    assert digest(lambda n: optax.sgd(1 / n)) != digest(lambda n: optax.sgd(2 / n))
    assert digest(optax.adam(0.1)) != digest(optax.adam(0.1, b1=0.8))
    assert digest(optax.sgd(0.1)) != digest(optax.sgd(0.1), horizon=7)


def test_the_digest_sees_theta_and_fields():
    rule = SmallFC()
    theta, other = (rule.init_theta(jax.random.key(seed)) for seed in (0, 1))
    assert digest(rule, theta=theta) == digest(SmallFC(), theta=theta, name="other")
    assert digest(rule, theta=theta) != digest(rule, theta=other)
    assert digest(rule, theta=theta) != digest(SmallFC(step_size=0.2), theta=theta)


class Looking(Told):
    def measure(self, subject, key):
        return {"x": jnp.ones(1), "key": jax.random.key_data(key)}


class LookingCloser(Looking):
    code = "S2"
    double = True


def test_each_probe_has_its_key_and_its_precision():
    closer, look = run(LookingCloser(), Looking()).results
    (alone,) = run(Looking()).results
    (later,) = run(Looking(), seed=1).results
    assert closer.measured["x"].dtype == np.float64
    assert look.measured["x"].dtype == np.float32
    keys = [tuple(r.measured["key"]) for r in (look, alone, closer, later)]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_references_are_those_of_the_same_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "_FOLDER", tmp_path)
    measured = {"adam": {"x": np.array([0.0, 0.25]), "full batch/y": np.arange(3)}}
    data = references.pack(Told(), measured)
    (tmp_path / "quick-S1.npz").write_bytes(data)
    report = run(Told(), Second())
    assert dict(report.results[0].others) == {
        "adam": Verdict(Level.PASS, 0.25, 0.75, "It is 0.25 & <i>0</i>.")
    }
    found = report.results[0].references["adam"]
    np.testing.assert_array_equal(found["full batch/y"], [0, 1, 2])
    assert report.missing == ("S2",)
    command = "python -m metaopt.stability.references --suite quick --only S2"
    assert report.missing_command == command
    assert command in page(report)
    assert run(Told()).missing_command == ""
    assert run(Told(value=0.1)).missing == ("S1",)
    assert run(Told(), suite="full").missing == ("S1",)


def test_references_are_kept_to_four_decimals():
    x = np.random.default_rng(0).lognormal(sigma=20.0, size=1000)
    np.testing.assert_allclose(references.shortened(x), x, rtol=2.0**-13)
    odd = np.array([np.inf, -np.inf, np.nan, 0.0, 1e300])
    np.testing.assert_array_equal(
        references.shortened(odd), [np.inf, -np.inf, np.nan, 0.0, np.inf]
    )
    z = np.array([[1.1 - 2.2j]])
    np.testing.assert_allclose(references.shortened(z), z, rtol=2.0**-13)


def test_the_table_of_probes_is_in_order():
    assert list(PROBES) == [f"S{i}" for i in range(1, 18)]
    for code, cls in PROBES.items():
        assert cls.code == code and cls.title and cls.question.endswith("?")
        assert cls.full().code == code
    assert set(QUICK) <= set(PROBES)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="suite must be"):
        run(Told(), suite="quik")
    with pytest.raises(ValueError, match="probes must be"):
        run("S99")
    with pytest.raises(ValueError, match="must be None with a Subject"):
        run(Told(), optimizer=subject(optax.sgd(0.1)))


def finding(code, measured, value=0.0, references=None, others=None):
    cls = type(code, (Told,), {"code": code})
    verdict = Verdict(Level.PASS, value, 1.0, "So.")
    return results.Result(cls(), verdict, measured, references or {}, others or {}, 1.0)


def report_of(*found):
    return results.Report("name", "quick", 0, found, {"JAX": "1"})


def test_the_three_headlines():
    adam = Verdict(Level.PASS, 0.002, 0.005, "")
    lyapunov = finding("S5", {"x": np.ones(1)}, 0.0125, others={"adam": adam})
    runs = {"horizon": 200, "length": 2000, "diverged_at": np.array([[np.inf, 500.0]])}
    tiers = {
        "tiers": np.array(["T0", "T1", "T2", "T4"]),
        "diverged_at": np.array([[1.0, 1.0], [np.inf, 7.0], [np.inf] * 2, [1.0, 1.0]]),
    }
    horizon = finding("S7", {k: np.asarray(x) for k, x in runs.items()})
    found = report_of(lyapunov, horizon, finding("S10", tiers)).headlines()
    assert [h.value for h in found] == [pytest.approx(0.0105), 2.5, 75.0]
    assert [h.text for h in found] == ["+0.0105", "2.5\u00d7", "75%"]
    runs["diverged_at"] = np.full((1, 2), np.inf)
    (_, endless, none) = report_of(finding("S7", runs)).headlines()
    assert endless.text == "\u2265 10\u00d7" and endless.value == 10.0
    assert none.text == "not measured" and none.value is None


def test_adam_of_the_quick_sizes_stands_in_for_a_rate_per_step():
    probe = LyapunovProbe.full()
    known = references.load("quick", LyapunovProbe())
    adam = LyapunovProbe().judge(known["adam"], known).value
    verdict = Verdict(Level.PASS, 0.004, 0.005, "So.")
    found = results.Result(probe, verdict, {"x": np.ones(1)}, {}, {}, 1.0)
    (headline, _, _) = report_of(found).headlines()
    assert headline.value == pytest.approx(0.004 - adam)
    assert "of the quick suite" in headline.note
    (unknown, _, _) = report_of(finding("S5", {"x": np.ones(1)}, 0.01)).headlines()
    assert unknown.text == "not measured"


def test_a_probe_without_references_is_not_missing_any():
    verdict = Verdict(Level.PASS, 0.0, 0.05, "So.")
    found = results.Result(CoverageProbe(), verdict, {"x": np.ones(1)}, {}, {}, 1.0)
    assert report_of(found).missing == ()


def test_chosen_references_are_measured_and_written(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(references, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr(references, "_FOLDER", folder)
    monkeypatch.setitem(suite.PROBES, "S1", Told)
    arguments = ["--only", "S1", "--optimizers", "adam", "lion"]
    assert references_command.main([*arguments, "--work", str(tmp_path)]) == 0
    assert "S1 adam: PASS" in capsys.readouterr().out
    assert set(references.load("quick", Told())) == {"adam", "lion"}


def test_json_is_strict_and_complete():
    odd = finding("S1", {"x": np.ones(1)}, math.inf)
    text = json.dumps(report_of(odd).as_json(), allow_nan=False)
    assert json.loads(text)["probes"][0]["value"] == "inf"
    found = json.loads(json.dumps(run(*EVERY).as_json(), allow_nan=False))
    assert set(found) == {
        "format", "name", "suite", "seed", "level", "exit_status", "headlines",
        "probes", "missing_references", "missing_command", "command", "facts",
    }  # fmt: skip
    assert [p["level"] for p in found["probes"]] == [
        "PASS", "WARN", "FAIL", "ERROR", "NA",
    ]  # fmt: skip
    for probe in found["probes"]:
        assert set(probe) == {
            "code", "title", "question", "level", "value", "threshold", "reason",
            "references", "seconds", "sizes", "traceback",
        }  # fmt: skip
    assert found["level"] == "FAIL" and found["exit_status"] == 2


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = dataclasses.replace(run(*EVERY), command="run --name '<x>'")
    path = write_report(report, folder)
    return path.read_text(), json.loads((folder / "report.json").read_text())


def test_the_page_escapes_what_it_is_told(written):
    text, _ = written
    for raw in ("<name>", "<b>", "<i>", "<script", "<luck>", "<state>", "<x>", "<s>"):
        assert raw not in text
    for raw in ("a <name>", "Told <b>&", "out of <luck>", "no <state>", "'<x>'"):
        assert html.escape(raw) in text


def test_the_page_needs_nothing_from_elsewhere(written):
    text, _ = written
    links = re.findall(
        r"(?:https?:)?//[^\s\"'<>]+", text.replace("/*", "").replace("*/", "")
    )
    assert set(links) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script|<link rel=.?stylesheet|<iframe|@import|\ssrc=", text)
    targets = re.findall(r'href="([^"]*)"', text) + re.findall(r"url\((.*?)\)", text)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert {t.lstrip("#") for t in targets} - {"data:,"} <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_numbers_of_the_page_are_those_of_the_json(written):
    text, found = written
    sections = re.findall(r"<section.*?</section>", text, flags=re.DOTALL)
    assert len(sections) == len(found["probes"]) == 5
    for section, probe in zip(sections, found["probes"], strict=True):
        assert f'id="{probe["code"]}"' in section
        assert f"</span>{probe['level']}</span>" in section
        assert html.escape(probe["reason"]) in section
        if probe["level"] in ("PASS", "WARN", "FAIL"):
            shown = results.number(probe["value"])
            assert f'<td class="number">{shown}</td>' in section
            assert f"Compared with {results.number(probe['threshold'])}." in section
            assert section.count("<svg") == 1
    for headline in found["headlines"].values():
        assert html.escape(headline["text"]) in text


def test_a_plot_that_fails_leaves_the_rest(monkeypatch):
    monkeypatch.setattr(Told, "plot", lambda *args: 1 / 0)
    assert "could not be drawn: division by zero" in page(run(Told()))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"metaopt-jax\[experiments\]"):
        page(run(Told()))


@pytest.fixture
def one_probe(monkeypatch):
    """Makes a suite of one probe, which says what it is given."""
    monkeypatch.setattr(backend, "prepare", lambda: None)
    monkeypatch.setitem(suite.SUITES, "quick", ("S1",))
    return lambda cls: monkeypatch.setitem(PROBES, "S1", cls)


@pytest.mark.parametrize("level", [Level.PASS, Level.WARN, Level.FAIL])
def test_the_exit_status_is_the_verdict(level, one_probe, tmp_path, capsys):
    one_probe(lambda: Told(level))
    command = ["stability", "sgd", "--out", str(tmp_path)]
    assert door.main(command) == int(level)
    shown = capsys.readouterr().out
    assert level.name in shown and "python -m experiments stability sgd" in shown
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["exit_status"] == int(level)
    assert found["command"].endswith(f"stability sgd --out {tmp_path}")
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["adma"], "Did you mean 'adam'"),
        (["sgd", "--suite", "quik"], "invalid choice"),
        (["sgd", "--probes", "S77"], "probes must be"),
        (["noisy_sgd"], "needs --learning-rate"),
        (["nothing_of_this", "--learning-rate", "1"], "no optimizer of that name"),
        (["soap"], "needs --learning-rate"),
        (["kfac", "--learning-rate", "1"], "evaluates the loss at other parameters"),
        (["adam", "--learning-rate", "nan"], "learning_rate must lie in"),
        (["adam", "--horizon", "0"], "horizon must be at least 1, got horizon=0"),
        (["no.such.module:tx"], "cannot be imported"),
        ([f"{__name__}:adam_at"], "one called num_steps, the inner steps of a run; it"),
        ([], "required: optimizer"),
    ],
)
def test_wrong_usage_is_no_verdict(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(backend, "prepare", lambda: None)
    assert door.main(["stability", *arguments]) == 64
    assert message in capsys.readouterr().err


def test_the_names_of_baselines_are_known():
    found = subjects.find("muon", rate=0.01, horizon=None)
    assert found.name == "muon 0.01"
    updates, _ = found.transformation(10).update(
        jnp.eye(2), found.transformation(10).init(jnp.eye(2)), jnp.eye(2)
    )
    assert float(updates[0, 0]) < 0.0


def test_a_failure_of_the_command_is_no_verdict(one_probe, tmp_path, capsys):
    one_probe(Told)
    target = tmp_path / "file"
    target.write_text("")
    assert door.main(["stability", "sgd", "--out", str(target)]) == 70
    assert "cannot write" in capsys.readouterr().err


def test_an_interruption_is_no_verdict(one_probe, tmp_path, capsys):
    class Interrupting(Told):
        def measure(self, subject, key):
            raise KeyboardInterrupt

    one_probe(Interrupting)
    assert door.main(["stability", "sgd", "--out", str(tmp_path)]) == 130
    assert "to go on" in capsys.readouterr().err


def adam_of(num_steps):
    return optax.adam(optax.linear_schedule(0.1, 0.0, num_steps))


def adam(learning_rate=0.1):
    return optax.adam(learning_rate)


def adam_at(learning_rate):
    return optax.adam(learning_rate)


MADE = optax.sgd(0.5)


def learned():
    rule = SmallFC()
    return rule, rule.init_theta(jax.random.key(0))


def test_optimizers_are_found_by_name(tmp_path):
    def find(name, rate=None, horizon=None):
        return subjects.find(name, rate=rate, horizon=horizon)

    rule, theta = learned()
    path = tmp_path / "mine.safetensors"
    save_weights(path, theta, rule, info={"config": {"horizon": 70}})
    assert find(str(path)).learned[0] == rule and find(str(path)).horizon == 70
    assert find(str(path), horizon=9).horizon == 9
    assert find("digits-small-fc").horizon == 1000
    assert find("sgd", rate=0.5).name == "sgd 0.5"
    assert find("sgd").name in field.references()
    assert find("momentum above 1").name == "momentum above 1"
    assert find(f"{__name__}:adam_of").needs_num_steps
    assert not find(f"{__name__}:adam").needs_num_steps
    step, _ = (
        find(f"{__name__}:adam")
        .transformation(500)
        .update(jnp.ones(1), optax.adam(1.0).init(jnp.ones(1)))
    )
    np.testing.assert_allclose(step, -0.1, rtol=1e-4)
    tx = find(f"{__name__}:MADE").transformation(10)
    assert float(tx.update(1.0, tx.init(1.0))[0]) == -0.5
    assert find("sgd", rate=0.5, horizon=30).horizon == 30
    assert find("sgd", horizon=30).horizon == 30
    assert find(f"{__name__}:learned", horizon=5).learned[0] == rule
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match="zip archive"):
        find(str(path))


def test_two_real_probes_end_to_end(tmp_path):
    bowl = (("bowl", Bowl((0.1, 1.0))),)
    sizes = {"tasks": bowl, "base": 20, "num_seeds": 3, "chunks": 10, "wrong": (10.0,)}
    probes = [HorizonProbe(**sizes), ReverseProbe()]
    report = run_suite(optax.sgd(0.1), name="sgd", out=tmp_path, probes=probes)
    assert levels(report) == [Level.PASS, Level.PASS]
    assert report.headlines()[1].text == "\u2265 10\u00d7"
    text = write_report(report, tmp_path).read_text()
    assert text.count("<svg") == 2 and "could not be drawn" not in text
    bad = run_suite(optax.sgd(2.5), name="bad", probes=probes[:1])
    assert levels(bad) == [Level.FAIL]


SHIPPED = sorted(pathlib.Path(references.__file__).parent.glob("*.npz"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_references_are_up_to_date_and_pass(path):
    size, code = path.stem.split("-")
    probe = PROBES[code].full() if size == "full" else PROBES[code]()
    known = references.load(size, probe)
    assert set(known) == set(field.references()), "measure the references anew"
    for name, measured in known.items():
        verdict = probe.judge(measured, known)
        assert verdict.level is Level.PASS, (name, verdict.reason)


def test_packed_references_are_read_as_they_were(tmp_path, monkeypatch):
    """Floats of 12 bits pass unchanged in any shape; others keep their type."""
    measured = {
        "whole": np.array([[1.5, -np.inf], [np.nan, 2.0**-130]], np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(0.25, np.float32),
        "count": np.array([3, 4]),
        "wave": np.array([1.0 + 2.0j], np.complex64),
        "names": np.array(["a", "bc"]),
    }
    path = tmp_path / "quick-S1.npz"
    path.write_bytes(references.pack(Told(), {"adam": measured}))
    with np.load(path) as archive:
        assert archive["adam|whole|planes"].shape == (4, 2, 2)
    monkeypatch.setattr(references, "_FOLDER", tmp_path)
    found = references.load("quick", Told())["adam"]
    assert set(found) == set(measured)
    for name, x in measured.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape
        np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_shipped_references_are_small(suite):
    sizes = [p.stat().st_size for p in SHIPPED if p.name.startswith(f"{suite}-")]
    assert 0 < sum(sizes) < 300_000
