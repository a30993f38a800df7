"""Results of all kinds, `report` of them, and the page that it writes, parsed."""

import json
from html.parser import HTMLParser

from lirpa_megatron.cli.commands import main

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&\x00\u202e\ud800"
VOID = {"meta", "img", "br"}


def sentence(name, **fields):
    """A result of a radius search on a sentence."""
    result = dict(
        network="bert", property=name, result="unsat", method="CROWN", lower_bounds=[0.5],
        tensor_parallel=2, seconds=2.0, counterexample=None, error=None, task="classification",
        question="radius", norm="2", eps=None, tokens=["[CLS]", "good", "film"], text="good film",
        label=1, predicted=1, label_name="positive", predicted_name="positive", margin=1.5,
        certified_radius=None, attacked_radius=None, positions=None, peak_memory_mib=100.0,
    )
    return result | fields


def certify(name, **fields):
    return sentence(name, question="certify", norm="inf", eps=0.01, **fields)


def vnnlib(name, result, bounds):
    return dict(network="net", property=name, result=result, method="CROWN", lower_bounds=bounds,
                tensor_parallel=1, seconds=0.5, counterexample=None)


def word(position, certified, attacked=None):
    return dict(position=position, certified_radius=certified, attacked_radius=attacked,
                result="unsat" if certified else "unknown", margin=0.1)


def run(results, folder, *arguments):
    """Status of `report` on some results, and the page it wrote (None if none)."""
    path, output = folder / "results.jsonl", folder / "page.html"
    path.write_text("".join(json.dumps(result) + "\n" for result in results))
    status = main(["report", str(path), "--output", str(output), *arguments])
    return status, output.read_text("utf-8") if output.exists() else None


class Page(HTMLParser):
    """The elements of a page; unbalanced tags are an error."""

    def __init__(self, page):
        super().__init__()
        self.open, self.counts, self.texts, self.attributes = [], {}, [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of_class(self, name):
        return sum(a == "class" and name in v.split() for _, a, v in self.attributes)


RADII = [
    sentence("a", certified_radius=0.01, attacked_radius=0.05),
    sentence("b", certified_radius=0.03, attacked_radius=None),
    sentence("c", certified_radius=0.02, attacked_radius=0.04, label=0, predicted=0),
    sentence("d", predicted=0, result="misclassified"),
    sentence("e", result="error", error="out of memory", predicted=None),
]


def hostile():
    fields = dict.fromkeys(("property", "network", "text", "label_name", "predicted_name"), HOSTILE)
    word_radii = [word(1, 0.1)]
    return [
        sentence("x", certified_radius=0.1, tokens=[HOSTILE] * 3, positions=word_radii) | fields,
        sentence("x", question="synonyms", result="sat", margin=None, counterexample=[HOSTILE]),
        sentence("</title></svg>" + HOSTILE, certified_radius=0.1),
        sentence("e", result="error", error=HOSTILE),
        vnnlib(HOSTILE, "unsat", [1.0]) | {"method": HOSTILE},
    ]
