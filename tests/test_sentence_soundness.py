"""What is said of a sentence is true: certificates are attacked, and all sizes say the same."""

import functools
import itertools
import math

import pytest
import ranks
import torch
import transformers

from lirpa_megatron.adapters.embeddings import embed
from lirpa_megatron.parallel import runtime
from lirpa_megatron.verify.sentences.attack import smallest_success
from lirpa_megatron.verify.sentences.options import NORMS, SentenceOptions
from lirpa_megatron.verify.sentences.sentence import SentenceVerifier
from lirpa_megatron.verify.sentences.task import make_task
from lirpa_megatron.verify.sentences.tokenizer import Vocabulary

SMALL = dict(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2)
TASKS = {
    "classification": ("bert", None), "label-tokens": ("gpt", "w1,w2|w3|w4,w5"),
    "next-token": ("gpt", None),
}
WORDS = Vocabulary("words", "[UNK]\n" + "".join(f"w{i}\n" for i in range(1, 32)))
BIAS = [-0.14, 0.0]
IDS, PLACES = [7, 3, 20, 11], [1, 2, 3]


def build(task, dtype=torch.float64):
    """(model, task) of a name."""
    kind, tokens = TASKS[task]
    model = {"gpt": transformers.gpt, "bert": transformers.bert}[kind](dtype, **SMALL)
    if kind == "bert":  # both classes can be reached
        with torch.no_grad():
            model.binary_head.bias.copy_(torch.tensor(BIAS))
    return model, make_task(None, model, transformers.VOCABULARY, tokens, WORDS)


def answer(task, ids=IDS, substitutes=None, seconds=None, built=None, **options):
    """The verdict on a sentence (runs on a rank)."""
    model, made = built or build(task)
    settings = SentenceOptions(**{"attack_steps": 10, "attack_restarts": 3, **options})
    settings.check()
    verifier = SentenceVerifier(model, made, settings, runtime.tp_group())
    return verifier.verify(ids, PLACES, None, substitutes or {}, seconds)

pytestmark = pytest.mark.usefixtures("session")


@pytest.fixture(scope="module")
def built(session):
    return functools.cache(build)


def hidden_of(model, ids):
    tokens = torch.as_tensor(ids).view(-1, len(IDS))
    has_types = getattr(model.embedding, "tokentype_embeddings", None) is not None
    return embed(model, tokens, tokentype_ids=torch.zeros_like(tokens) if has_types else None)


def margins(model, task, hidden, label):
    """Of the label at points [N, S, h]; a GPT's by Megatron's own forward."""
    if task.name == "classification":
        scores = task.scores(task.net(hidden))
    else:
        positions = torch.arange(len(IDS)).expand(len(hidden), -1)
        logits = model(positions, positions, None, decoder_input=hidden.transpose(0, 1))
        scores = task.scores(logits[:, -1])
    others = [k for k in range(scores.shape[1]) if k != label]
    return scores[:, label] - scores[:, others].amax(1)


def points_of(norm, radius, places, count=300):
    """Perturbations in the ball, most of them at its border: corners, directions, vertices."""
    generator = torch.Generator().manual_seed(2)
    shape = (count, len(places), SMALL["hidden_size"])
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    if norm == math.inf:
        drawn[: count // 2] = drawn[: count // 2].sign()
    if norm == 1:
        vertices = torch.eye(drawn[0].numel(), dtype=torch.float64).view(-1, *shape[1:])
        drawn = torch.cat((drawn, vertices, -vertices))
    sizes = torch.linalg.vector_norm(drawn.flatten(1), ord=norm, dim=1)
    moved = torch.zeros(len(drawn), len(IDS), shape[2], dtype=torch.float64)
    moved[:, places] = drawn * (radius / sizes).view(-1, 1, 1)
    return moved


def smallest_in_ball(model, task, label, norm, radius, places):
    """The smallest margin met in a ball, by sampling and by gradients."""
    hidden = hidden_of(model, IDS)
    with torch.no_grad():
        sampled = margins(model, task, hidden + points_of(norm, radius, places), label).min()
    where = torch.zeros(len(IDS), dtype=torch.bool)
    where[places] = True
    lowest = [float(sampled)]

    def margin(points):
        values = margins(model, task, points, label)
        lowest.append(float(values.detach().min()))
        return values

    broken = smallest_success(margin, hidden, where, norm, radius, 30, 4, 1, None)
    assert broken is None or broken <= radius * (1 + 1e-9)
    return min(lowest), broken


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_the_models(task, built):
    model, made = built(task)
    tokens = torch.tensor([IDS])
    positions = torch.arange(len(IDS)).unsqueeze(0)
    with torch.no_grad():
        if task == "classification":
            types = torch.zeros_like(tokens)
            want = model(tokens, torch.ones(1, len(IDS)), tokentype_ids=types)[1][0]
        else:
            want = model(tokens, positions, None)[0, -1]
        if task == "label-tokens":
            want = torch.stack([want[[1, 2]].max(), want[3], want[[4, 5]].max()])
        got = made.scores(made.net(hidden_of(model, IDS)))[0]
    assert (got - want).abs().max() < 1e-12
    verdict = answer(task, built=built(task), question="certify", eps=0.0)
    assert verdict.predicted == int(want.argmax()) and verdict.result == "unsat"
    assert verdict.finding.margin == pytest.approx(verdict.clean_margin, rel=1e-9)
    gap = (want.topk(2).values[0] - want.topk(2).values[1]).item()
    assert verdict.clean_margin == pytest.approx(gap, rel=1e-9)


# Enough for every run: each task with the box, each norm with the classifier.
CERTIFIED = [
    pytest.param(
        task, norm,
        marks=() if task == "classification" or norm == "inf" else pytest.mark.slow,
    )
    for task in TASKS for norm in NORMS
]


@pytest.mark.parametrize("task, norm", CERTIFIED)
def test_no_attack_succeeds_within_a_certified_radius(task, norm, built):
    model, made = built(task)
    verdict = answer(task, built=built(task), norm=norm)
    found, label = verdict.finding, verdict.predicted
    assert verdict.result == "unsat" and 0 < found.certified_radius <= found.attacked_radius
    radius = found.certified_radius
    lowest, broken = smallest_in_ball(model, made, label, NORMS[norm], radius, PLACES)
    assert lowest > 0 and broken is None
    # What the attack is said to have done, another attack can do, with a little more room.
    *_, broken = smallest_in_ball(
        model, made, label, NORMS[norm], 1.2 * found.attacked_radius, PLACES
    )
    assert broken is not None
    # The margin said at a radius is below all that are met there.
    certified = answer(task, built=built(task), norm=norm, question="certify", eps=radius)
    assert certified.result == "unsat" and 0 < certified.finding.margin <= lowest
    wider = answer(
        task, built=built(task), norm=norm, question="certify", eps=found.attacked_radius * 1.5
    )
    assert wider.result == "sat" and (wider.finding.margin or -1.0) <= 0
    assert wider.finding.attacked_radius <= found.attacked_radius * 1.5 * (1 + 1e-9)


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN-Optimized"])
def test_other_methods_are_as_sound(method, built):
    model, made = built("classification")
    found = answer(
        "classification", built=built("classification"), method=method, attack_steps=0,
        alpha_iterations=2, tolerance=0.3,
    ).finding
    assert found.certified_radius > 0 and found.attacked_radius is None
    label = answer("classification", built=built("classification"), question="certify",
                   eps=0.0).predicted
    lowest, broken = smallest_in_ball(
        model, made, label, math.inf, found.certified_radius, PLACES
    )
    assert lowest > 0 and broken is None


@pytest.mark.parametrize(
    "task", ["classification", pytest.param("next-token", marks=pytest.mark.slow)]
)
def test_one_word_at_a_time(task, built):
    model, made = built(task)
    together = answer(task, built=built(task), attack_steps=0).finding.certified_radius
    verdict = answer(task, built=built(task), words="each")
    assert verdict.result == "unsat" and list(verdict.positions) == PLACES
    assert verdict.finding is None
    for place, found in verdict.positions.items():
        radius = found.certified_radius
        assert together * (1 - 0.02) <= radius <= (found.attacked_radius or math.inf)
        lowest, broken = smallest_in_ball(
            model, made, verdict.predicted, math.inf, radius, [place]
        )
        assert lowest > 0 and broken is None


def close_words(built, task, spread):
    """The model with tokens 21 to 26 around those of the sentence; substitutes made of them."""
    model, made = build(task)
    table = model.embedding.word_embeddings.weight
    generator = torch.Generator().manual_seed(4)
    substitutes = {1: [21, 22], 2: [23], 3: [24, 25, 26]}
    with torch.no_grad():
        for place, others in substitutes.items():
            for other in others:
                drawn = torch.randn(SMALL["hidden_size"], generator=generator, dtype=torch.float64)
                table[other] = table[IDS[place]] + spread * drawn
    return (model, made), substitutes


def every_sentence(substitutes):
    choices = [[IDS[p], *substitutes.get(p, ())] for p in range(len(IDS))]
    return torch.tensor(list(itertools.product(*choices)))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("options", [{}, {"shape": "box"}, {"shape": "box", "eps": 1e-4},
                                     {"words": "each"}], ids=str)
def test_exchanged_words(task, options):
    """Spreads from where all is certified to where a sentence is misread."""
    said = set()
    for spread in (1e-3, 0.03, 1.0, 5.0):
        pair, substitutes = close_words(build, task, spread)
        verdict = answer(task, substitutes=substitutes, built=pair, question="synonyms", **options)
        said.add(verdict.result)
        model, made = pair
        each = options.get("words") == "each"
        sets = [{p: ids} for p, ids in substitutes.items()] if each else [substitutes]
        findings = list(verdict.positions.values()) if each else [verdict.finding]
        for chosen, found in zip(sets, findings, strict=True):
            sentences = every_sentence(chosen)
            with torch.no_grad():
                met = margins(model, made, hidden_of(model, sentences), verdict.predicted)
            assert found.margin is None or found.margin <= met.min() + 1e-9
            if found.result == "unsat":
                assert (met > 0).all() and found.margin > 0
            elif found.result == "sat":
                assert found.sentence in sentences[met <= 1e-9].tolist()
            else:  # few sentences: the search for a wrong one is exhaustive
                assert found.result == "unknown" and (met > 0).all()
    assert "unsat" in said and said - {"unsat"}


def test_words_without_substitutes_stay_as_they_are(built):
    for words in ("all", "each"):
        verdict = answer("classification", built=built("classification"), words=words,
                         question="synonyms")
        assert verdict.result == "unsat"
        assert verdict.finding.margin == pytest.approx(verdict.clean_margin, rel=1e-9)


def test_a_graph_serves_sentences_of_its_length_one_after_another(built):
    """The bounds of one sentence leave nothing behind for the next."""
    model, made = built("next-token")
    options = SentenceOptions(question="certify", eps=1e-3, attack_steps=0)
    shared = SentenceVerifier(model, made, options, None)
    for ids in (IDS, [1, 2, 3, 4], IDS[::-1], IDS[:3], IDS, [5], [6, 7], [1, 2, 3, 4, 5], IDS):
        places = list(range(len(ids)))
        fresh = SentenceVerifier(model, made, options, None).verify(ids, places, None, {})
        again = shared.verify(ids, places, None, {})
        assert again == fresh
    assert len(shared._graphs) <= 4


def test_a_label_that_is_not_predicted_is_misclassified(built):
    model, made = built("classification")
    verifier = SentenceVerifier(model, made, SentenceOptions(), None)
    predicted = verifier.verify(IDS, PLACES, None, {}, 1e-9).predicted
    verdict = verifier.verify(IDS, PLACES, 1 - predicted, {})
    assert verdict.result == "misclassified" and verdict.finding is None
    assert verdict.predicted == predicted and verdict.clean_margin < 0


def test_time_that_is_over_is_a_timeout(built):
    for words in ("all", "each"):
        verdict = answer("next-token", built=built("next-token"), seconds=1e-9, words=words)
        assert verdict.result == "timeout"


def test_scores_that_are_not_finite_are_no_answer():
    model, made = build("classification")
    with torch.no_grad():
        model.binary_head.bias.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="scores are not finite"):
        answer("classification", built=(model, made))


# Sizes.

QUESTIONS = [
    dict(question="certify", eps=1e-3), dict(question="certify", eps=1e-3, norm="1"),
    dict(question="synonyms", attack_steps=0),
    dict(norm="2", tolerance=0.3, attack_steps=2, attack_restarts=1),
]
MORE_QUESTIONS = [
    dict(question="certify", eps=1e-3, norm="2"), dict(), dict(norm="1"), dict(words="each"),
]


def numbers(task, questions):
    """Margins and radii (runs on a rank)."""
    pair, found = build(task), []
    for question in questions:
        verdict = answer(task, substitutes={1: [4]}, built=pair, **question)
        findings = [verdict.finding, *verdict.positions.values()]
        found.append([
            (f.margin, f.certified_radius, f.attacked_radius) for f in findings if f is not None
        ])
    return found


def same_numbers(task, questions):
    alone = numbers(task, questions)
    for sharded in ranks.pool(2).run(numbers, task, questions):
        for question, one, two in zip(questions, alone, sharded, strict=True):
            for (m1, *r1), (m2, *r2) in zip(one, two, strict=True):
                assert (m1 is None) == (m2 is None), question
                assert m1 is None or abs(m1 - m2) <= 1e-10 * max(abs(m1), 1e-3), question
                for a, b in zip(r1, r2, strict=True):
                    assert a == b or a == pytest.approx(b, rel=0.02), question


@pytest.mark.parametrize(
    "task",
    ["classification", *(pytest.param(t, marks=pytest.mark.slow) for t in list(TASKS)[1:])],
)
def test_two_ranks_say_what_one_says(task):
    same_numbers(task, QUESTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_say_what_one_says_to_other_questions(task):
    same_numbers(task, MORE_QUESTIONS)
