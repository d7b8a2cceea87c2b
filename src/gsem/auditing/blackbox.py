"""Black-box attacks against white-box attacks: where a gradient is masked, those that use none break more."""

from typing import Any

import numpy as np

from gsem.auditing.check import GREATLY, SLIGHTLY, Finding, check
from gsem.auditing.context import AuditContext, several
from gsem.evaluation.statistics import binomial_quantile


def most_by_chance(images: int) -> int:
    """How many of so many images one attack may break and another miss, although both search equally well.

    By its random start and its finite effort an attack misses up to 0.003 of the images that another try breaks: the
    tolerance of the sweeps too. A binomial count with that share exceeds the number in at most 2.5% of cases.
    """
    return binomial_quantile(images, SLIGHTLY)


@check(
    name="blackbox",
    question="Do black-box attacks break what white-box attacks do not?",
    threshold=lambda ctx: (
        f"over {most_by_chance(len(ctx.x))} of {len(ctx.x)} images: a share over {SLIGHTLY:.3f}, beyond chance"
    ),
    reference="Athalye et al., ICML 2018, section 3.1; Chen & Gu, KDD 2020 (RayS)",
)
def blackbox(ctx: AuditContext) -> Finding:
    """Attacks that use no gradient of the model break hardly anything that the white-box attacks do not.

    A few images are no flag: two equally good searches do not break the same ones. They count in the lowest accuracy.
    """
    after = ctx.white_box
    rows: list[dict[str, Any]] = []
    for attack in ctx.black_box:
        points = ctx.without_gradient(attack)
        after = after.worse_of(points)
        broken = ctx.broken_beyond_noise(ctx.white_box.wrong, points.wrong)
        merged = ctx.accuracy(ctx.white_box.worse_of(points)).mean
        row = {"attack": ctx.label(attack), **ctx.accuracy(points).as_accuracy()}
        rows.append(row | {"merged": merged, "only_here": int(broken.sum())})
    only = ctx.broken_beyond_noise(ctx.white_box.wrong, after.wrong)
    figure, count, by_chance = float(only.mean()), int(only.sum()), most_by_chance(len(only))
    if not ctx.white:
        left = ", ".join(f"{row['attack']} {row['accuracy']:.1%}" for row in rows)
        reason = f"there are no attacks that follow a gradient to compare with; the accuracy under {left}"
        return Finding(None, "not applicable", reason, details={"attacks": rows})
    before, now, gain = ctx.accuracy(ctx.white_box), ctx.accuracy(after), ctx.gain(ctx.white_box, after)
    greatly = gain.mean > GREATLY and gain.low > 0
    details = {
        "by_chance": by_chance,
        "attacks": rows,
        "images": np.flatnonzero(only).tolist(),
        "source_models": list(ctx.source_models),
    }
    if not count and not greatly:
        reason = f"{', '.join(row['attack'] for row in rows)} break no image that the white-box attacks left"
        return Finding(figure, "pass", reason, details=details)
    worst = max(rows, key=lambda row: row["only_here"])["attack"]
    reason = (
        f"{count} of {several(len(only), 'images')} {'is' if count == 1 else 'are'} broken only without the model's "
        f"gradient (most by {worst}): the accuracy is {now.mean:.1%}, not {before.mean:.1%}"
    )
    if count <= by_chance and not greatly:
        reason += f"; up to {by_chance} may be chance, as no two searches break the same images"
        return Finding(figure, "pass", reason, details=details)
    advice = f"Report the worst case with {worst}, and find out why following the gradient misses these points."
    finding = Finding(figure, "flag", reason, advice, details=details)
    repaired = ctx.known_by_gradient
    again = int(ctx.broken_beyond_noise(repaired.wrong, np.maximum(repaired.wrong, after.wrong)).sum())
    how = "the repaired attacks of the other checks" if ctx.repairs else "no repaired attack"
    return ctx.mitigated(finding, how, ctx.repairs, after, again=again / len(only), answered=again <= by_chance)
