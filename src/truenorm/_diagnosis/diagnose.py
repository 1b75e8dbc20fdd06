"""diagnose: runs the rules of the table and gathers what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from truenorm._checks import known_options
from truenorm._diagnosis.facts import Facts
from truenorm._diagnosis.rule import Rule
from truenorm._diagnosis.table import RULES
from truenorm._errors import DataError, OptionError
from truenorm._model.data import check_limits
from truenorm._model.domains import of_domain, require_one_domain
from truenorm._model.progress import Wanted, shown
from truenorm._model.sites import batch_normalizations, spots
from truenorm._records.diagnosis import Diagnosis, Finding, Skipped

Codes = str | Sequence[str] | None


@known_options
def diagnose(
    model: Any,
    data: Any = None,
    y: Any = None,
    *,
    select: Codes = None,
    ignore: Codes = None,
    batch_size: int = 32,
    progress: Wanted = None,
    domain: int | None = None,
) -> Diagnosis:
    r"""What is wrong with a model's BatchNormalization, as findings like a linter's.

    Every rule has a code and a page in ``docs/findings/``: ``TN1`` statistics, ``TN2`` parameters,
    ``TN3`` structure, ``TN4`` modes, ``TN5`` deployment. A finding has its severity, its site, what
    was measured, and a call that mends it. How far wrong statistics :math:`m, v` put a layer's
    output off is measured in units of that output: for a standardised value :math:`z`,

    .. math:: \text{error}^2 = \operatorname{E}\left[\left(
              z \left(\frac{\sqrt{\sigma^2 + \epsilon}}{\sqrt{v + \epsilon}} - 1\right)
              + \frac{\mu - m}{\sqrt{v + \epsilon}} \right)^2\right].

    Args:
        model: Any built ``keras.Model``, with stock layers or ours; nothing in it changes. Of a
            subclassed one the rules run that need no graph.
        data: What ``fit`` takes, best the training set: arrays, ``(x, y)``, a PyDataset, or an
            iterable of batches. It is read twice (an iterator is kept in memory): all of it for
            the statistics, then up to 32 batches, spread evenly, on which training and inference
            are compared; these once more where only then a rule asks what recalibration would
            change. Without it the rules that need it are skipped, and the record says so.
        y: Labels of array data that comes without them. With labels and a compiled model, its own
            loss and metrics are compared between training and inference mode; where these labels
            do not make a loss, the outputs are.
        select: Codes, or beginnings of codes (``"TN1"``), of the rules to run; all, if None. What
            only other rules need is not computed.
        ignore: Codes, or beginnings of codes, of rules not to run. Of a code that both name, the
            longer beginning decides.
        batch_size: Of array data; that of training, for the rules about batches.
        progress: Whether to show what is going on, on the standard error stream. None: on a
            terminal and in a notebook.
        domain: As in :func:`truenorm.collect`: the domain that the data is of.

    Returns:
        The findings; ``clean`` is whether none is above a note.

    Raises:
        ModelError: The model is not built, or has no BatchNormalization.
        DataError: The data is empty, has no end, or does not fit the model.
        OptionError: No rule's code begins as ``select`` or ``ignore`` says.

    Example:
        >>> import keras, numpy as np, truenorm as tn
        >>> layer = keras.layers.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((2,)), layer, keras.layers.Dense(1)], name="net")
        >>> data = np.random.default_rng(0).normal(5.0, 2.0, size=(100, 2)).astype("float32")
        >>> for finding in tn.diagnose(model, data, select="TN1", batch_size=25).findings:
        ...     print(finding.code, finding.severity, finding.site, finding.remedy)
        TN101 warning bn tn.recalibrate(model, data)
        TN110 warning net tn.recalibrate(model, data)

    Reference:
        Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576; each rule's page
        has its own.
    """
    wanted = selection(select, ignore)
    if domain is not None:
        model = of_domain(model, domain)
    require_one_domain(batch_normalizations(model))  # refuses what there is nothing to say of
    refuse_endless(data)
    kept = list(data) if isinstance(data, Iterator) else data
    with shown(progress, "diagnosing") as line:
        facts = Facts(model, kept, y, batch_size, line)
        return judged(facts, wanted)


def judged(facts: Facts, wanted: Callable[[Rule], bool]) -> Diagnosis:
    """What the wanted rules find in these facts."""
    findings: list[Finding] = []
    checked: list[str] = []
    skipped: dict[str, list[str]] = {}
    for rule in filter(wanted, RULES):
        facts.line.step(rule.code)
        reason = next(filter(None, map(facts.lacks, rule.needs)), None)
        if reason is not None:
            skipped.setdefault(reason, []).append(rule.code)
            continue
        checked.append(rule.code)
        findings += [Finding(rule.code, rule.severity, rule.problem, *f) for f in rule.check(facts)]
    left = tuple(Skipped(tuple(codes), reason) for reason, codes in skipped.items())
    if facts.unscored is not None:
        left = (*left, Skipped(("the loss",), facts.unscored))
    sites = tuple(dict.fromkeys(spot.path for spot in spots(facts.model)))
    return Diagnosis(facts.model.name, tuple(findings), tuple(checked), left, sites, facts.compared)


def refuse_endless(data: Any) -> None:
    """Endless data would be read for ever; here there is no limit to give, as elsewhere."""
    try:
        check_limits(data, None, None)
    except DataError as error:
        raise DataError(
            "This data has no end",
            where="data",
            remedy="give a part of it: dataset.take(100), or a list of some batches",
        ) from error


def selection(select: Codes, ignore: Codes = None) -> Callable[[Rule], bool]:
    """Which rules to run: the longest beginning of a code decides, ``ignore`` where they tie."""
    chosen, refused = _beginnings(select, "select"), _beginnings(ignore, "ignore")

    def longest(code: str, beginnings: Sequence[str]) -> int:
        return max((len(one) for one in beginnings if code.startswith(one)), default=-1)

    def wanted(rule: Rule) -> bool:
        default = 0 if select is None else -1
        return max(longest(rule.code, chosen), default) > longest(rule.code, refused)

    return wanted


def _beginnings(codes: Codes, argument: str) -> tuple[str, ...]:
    single = isinstance(codes, str) or not isinstance(codes, Iterable)
    given: tuple[Any, ...] = () if codes is None else (codes,) if single else tuple(codes)
    for one in given:
        if (
            not isinstance(one, str)
            or not one
            or not any(rule.code.startswith(one) for rule in RULES)
        ):
            raise OptionError(
                "No rule has a code that begins so",
                where=argument,
                expected="TN1, TN2, TN3, TN4, TN5, or more of a code, as TN101",
                received=repr(one),
            )
    return given
