"""`lirpa-megatron report`: its sums, its page, and how it fails."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from reports import RADII, Page, certify, hostile, run, sentence, vnnlib, word

from lirpa_megatron.cli.commands import main
from lirpa_megatron.report.summary import (
    accuracy_curve,
    at_least,
    at_most,
    summarise,
    summary_table,
)

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("unchanged_environment")


def only_group(results):
    (group,) = summarise(results)["groups"]
    return group


def test_an_error_and_a_wrong_prediction_count_as_not_certified():
    group = only_group(RADII)
    assert group["inputs"] == group["labelled"] == 5
    assert group["certified"] == 3 and group["attacked"] == 2
    assert group["clean_accuracy"] == group["certified_accuracy"] == 3 / 5
    assert (group["counts"]["error"], group["counts"]["misclassified"]) == (1, 1)
    assert group["seconds_per_input"] == 2.0 and group["peak_memory_mib"] == 100.0


def test_mean_radius_is_over_the_inputs_not_misclassified_and_an_error_counts_as_zero():
    group = only_group(RADII)
    assert group["radius_inputs"] == 4
    assert group["mean_radius"] == pytest.approx(0.06 / 4)
    assert group["median_radius"] == pytest.approx(0.015)
    assert group["min_radius"] == 0.0


def test_accuracy_curve_steps_down_at_each_radius():
    curve = accuracy_curve(RADII)
    assert curve["certified"] == [(0.01, 0.6), (0.02, 0.4), (0.03, 0.2)]
    # the error may be right: not proved, but not excluded either
    assert curve["limit"] == [(0.04, 0.8), (0.05, 0.6)] and curve["limit_end"] == 0.4
    for radius in (0.001, 0.01, 0.015, 0.02, 0.03, 0.045):
        sound = sum(r["certified_radius"] is not None and r["certified_radius"] >= radius
                    for r in RADII) / 5
        assert sound == next((s for end, s in curve["certified"] if radius <= end), 0.0)


@pytest.mark.parametrize("margin", [None, math.nan, math.inf, 0.0, -1.0])
def test_unsat_without_a_positive_margin_is_not_certified_and_is_reported(margin):
    group = only_group([certify("a", margin=margin), certify("b", margin=0.5)])
    assert group["certified"] == 1 and group["certified_accuracy"] == 0.5
    assert group["contradictions"] == ["a: result unsat, but no margin above 0"]


@pytest.mark.parametrize("radius", [None, math.nan, math.inf, -0.1])
def test_a_radius_that_is_no_number_certifies_nothing(radius):
    group = only_group([sentence("a", certified_radius=radius)])
    assert group["certified"] == 0 and group["certified_accuracy"] == 0
    assert accuracy_curve([sentence("a", certified_radius=radius)])["certified"] == []


def test_a_sentence_is_as_strong_as_its_weakest_word():
    words = [word(1, 0.3), word(2, 0.1, attacked=0.2)]
    assert only_group([sentence("a", positions=words)])["mean_radius"] == 0.1
    assert only_group([sentence("a", positions=words, certified_radius=0.2)])["mean_radius"] == 0.1
    assert only_group([sentence("a", positions=[*words, word(0, None)])])["mean_radius"] == 0.0


def test_a_certified_radius_above_an_attacked_one_is_a_contradiction(tmp_path):
    bad = [
        sentence("a", certified_radius=0.2, attacked_radius=0.1),
        sentence("b", positions=[word(1, 0.3, attacked=0.2)]),
        certify("c", result="sat"),
    ]
    found = [text for group in summarise(bad)["groups"] for text in group["contradictions"]]
    assert found == [
        "a: certified at radius 0.2, but attacked at 0.1",
        "b, word 1: certified at radius 0.3, but attacked at 0.2",
        "c: result sat, but the margin is above 0",
    ]
    _, page = run(bad, tmp_path)
    assert "do not rely on any of this run" in page
    equal = sentence("a", certified_radius=0.1, attacked_radius=0.1)
    assert only_group([equal])["contradictions"] == []


def test_without_labels_there_is_no_accuracy_but_a_certified_share():
    free = [certify("a", label=None), certify("b", label=None, result="unknown", margin=-1.0)]
    group = only_group(free)
    assert group["certified_accuracy"] is None and group["certified_share"] == 0.5


def test_settings_are_told_apart_and_an_input_counts_once_in_each():
    results = [certify("a"), certify("a", method="IBP"), sentence("a"), vnnlib("p", "unsat", [1.0])]
    assert [group["inputs"] for group in summarise(results)["groups"]] == [1, 1, 1, 1]
    two_eps = [certify("a"), certify("a") | {"eps": 0.02}]
    assert [group["eps"] for group in summarise(two_eps)["groups"]] == [[0.01], [0.02]]
    own_eps = [certify("a"), certify("b") | {"eps": 0.02}]
    assert [group["eps"] for group in summarise(own_eps)["groups"]] == [[0.01, 0.02]]
    assert only_group([certify("a"), certify("a")])["repeated"] == 1


def test_what_was_proved_is_never_rounded_up():
    assert at_least(0.0123456) == "0.01234" and at_most(0.0123412) == "0.01235"
    assert at_least(-0.0123412) == "-0.01235" and at_least(0.3) == at_most(0.3) == "0.3"


def test_the_summary_is_plain_data_and_a_table():
    summary = summarise([*RADII, certify("a"), vnnlib("p", "unknown", [None])])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    table = summary_table(summary)
    assert re.search(r"clean accuracy +60.0% \(3 of 5\) +100.0% \(1 of 1\) +-", table)


def test_the_page_is_well_formed_and_has_every_number(tmp_path, capsys):
    words = [word(1, 0.0123), word(2, None)]
    mixed = [*RADII, sentence("w", positions=words), certify("m", margin=0.0456),
             vnnlib("p", "unsat", [0.7891, 0.9]), vnnlib("q", "unknown", [-2.5])]
    status, page = run(mixed, tmp_path)
    assert status == 0 and "mean certified radius" in capsys.readouterr().out
    parsed = Page(page)
    assert parsed.counts["svg"] == 4 and parsed.counts["section"] == 3
    assert parsed.of_class("row") == 4 + 1 + 2  # bars: no error and no misclassified one
    assert parsed.of_class("level4") == 2 and parsed.of_class("none") == 2  # and the legend
    shown = "".join(text for _, text in parsed.texts)
    for number in ("0.01", "0.03", "0.05", "0.0123", "0.0456", "0.7891", "-2.5", "50.0% (3 of 6)"):
        assert number in shown, number
    titles = [text for tag, text in parsed.texts if tag == "title"]
    assert "a: certified 0.01, attacked 0.05" in titles
    assert "b: certified 0.03, no attack succeeded" in titles
    labels = [value for tag, name, value in parsed.attributes if (tag, name) == ("svg", "role")]
    assert labels == ["img"] * 4


def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path):
    _, page = run([*RADII, vnnlib("p", "unsat", [1.0])], tmp_path)
    assert "http:" not in page and "https:" not in page
    parsed = Page(page)
    (policy,) = (v for _, name, v in parsed.attributes if name == "content" and "default-src" in v)
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert not {"script", "link", "img", "iframe", "object", "base"} & parsed.counts.keys()
    names = {name for _, name, _ in parsed.attributes}
    assert not {"src", "href", "xlink:href"} & names and not any(n.startswith("on") for n in names)
    assert "url(" not in page and "@import" not in page


def test_hostile_text_is_inert(tmp_path):
    status, page = run(hostile(), tmp_path)
    assert status == 0
    assert not {"script", "img"} & Page(page).counts.keys()
    assert "\x00" not in page and page.count("&lt;script&gt;") > 10
    assert not any(name.startswith("on") for _, name, _ in Page(page).attributes)


def test_many_inputs_fit_a_plot_of_fixed_height(tmp_path):
    many = [certify(f"s{i}", margin=i - 500.0, result="unsat" if i > 500 else "unknown")
            for i in range(1000)]
    _, page = run(many, tmp_path)
    (height,) = re.findall(r'viewBox="0 0 720 (\d+)', page)
    assert int(height) < 1000 and Page(page).of_class("row") == 1000


@pytest.mark.parametrize("extreme", [1e308, 5e-324, 0.0])
def test_extreme_numbers_are_drawn(extreme, tmp_path):
    results = [vnnlib("p", "unsat", [extreme]), vnnlib("q", "unknown", [-extreme]),
               sentence("a", certified_radius=extreme)]
    status, page = run(results, tmp_path)
    assert status == 0 and not re.search(r'="-?(nan|inf)', page)


@pytest.mark.parametrize("line, message", [
    ("{", "it is not JSON"),
    ("[" * 1_000, "it is nested too deeply"),
    ('{"a": "[[[' + '\\"' * 100_000, "it is not JSON"),
    ("[]", "it is not a JSON object"),
    ('{"network": "n"}', "it has no property"),
    (json.dumps(vnnlib("p", "proved", [])), "its result is not one of unsat, sat"),
    (json.dumps(vnnlib("p", "unsat", ["x"])), "its lower_bounds is not a list of numbers"),
    (json.dumps(vnnlib("p", ["unsat"], [])), "its result is not one of unsat, sat"),
    (json.dumps(sentence("a", certified_radius="0.1")), "its certified_radius is not a number"),
    (json.dumps(sentence("a", positions=[word(3, 0.1)])), "position 3 is none of its tokens"),
    (json.dumps(sentence("a", positions=[5])), "its positions are not objects"),
    (json.dumps(sentence("a", tokens="abc")), "its tokens is not a list of texts"),
    (json.dumps(sentence("a", seconds=-1)), "its seconds is not a time"),
])
def test_a_broken_line_is_named_by_its_number(line, message, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(vnnlib("p", "unsat", [1.0])) + "\n\n" + line + "\n")
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"line 3 of {path} is not a result of verify: {message}" in said
    assert not (tmp_path / "page.html").exists()


def test_files_that_cannot_be_read_or_written_are_one_line(tmp_path, capsys):
    good, empty, binary = (tmp_path / name for name in ("good", "empty", "binary"))
    good.write_text(json.dumps(vnnlib("p", "unsat", [1.0])) + "\n")
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for results, output, message in (
        (tmp_path / "no", "page", "cannot be read: No such file or directory"),
        (empty, "page", "is empty: there is nothing to report"),
        (binary, "page", "is not a text file in UTF-8"),
        (good, "no/page", "cannot be written: No such file or directory"),
        (good, "good", "is the file of results: choose another name"),
        (good, ".", "cannot be written"),
    ):
        assert main(["report", str(results), "--output", str(tmp_path / output)]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert message in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary", "empty", "good"]


def test_the_command_imports_neither_torch_nor_auto_lirpa(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(vnnlib("p", "unsat", [1.0])) + "\n")
    code = (
        "import sys\n"
        "for name in ('torch', 'megatron', 'auto_LiRPA', 'numpy'): sys.modules[name] = None\n"
        "from lirpa_megatron.cli.commands import main\n"
        f"sys.exit(main(['report', {str(path)!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             cwd=tmp_path, env=environment, timeout=60)
    assert process.returncode == 0, process.stderr
    assert "VNN-LIB property" in process.stdout and (tmp_path / "report.html").exists()
