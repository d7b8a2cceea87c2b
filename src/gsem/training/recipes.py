"""The named recipes: the values of ours, of the paper, and of the baselines."""

from dataclasses import replace

from gsem.training.recipe import Recipe

GCAT_PUBLISHED = Recipe(
    name="gcat-published",
    model="gsem-resnet18",
    augment="autoaugment",
    steps=10,
    eot=10,
    draws=10,
    epochs=150,
    rounds=5,
    batch_size=256,
    lr=0.01,
    schedule="step",
    milestones=(60, 110),
    weight_decay=3.5e-3,
    precision="fp16",
)

GCAT_MART_PUBLISHED = replace(GCAT_PUBLISHED, name="gcat-mart-published", objective="mart", adversarial_fraction=1.0)

GCAT = Recipe(
    name="gcat",
    adversarial_fraction=1.0,
    steps=5,
    epochs=30,
    lr=0.1,
    warmup=1.0,
    nesterov=True,
    ema=0.995,
)

# The baselines, with the values their papers used, on the plain network. Madry-style training as Rice et al. (2020)
# run it; TRADES of Zhang et al. (2019), CIFAR-10; MART of Wang et al. (2020), ResNet-18; AWP of Wu et al. (2020).
# The attack step of TRADES and MART, 0.007, is taken as eps/4 = 0.0078, so that it follows eps on other data.
STANDARD = Recipe(
    name="standard",
    model="resnet18",
    adversarial_fraction=0.0,
    epochs=200,
    lr=0.1,
    schedule="step",
    milestones=(100, 150),
)
PGD_AT = replace(STANDARD, name="pgd-at", adversarial_fraction=1.0)
TRADES = replace(
    PGD_AT,
    name="trades",
    objective="trades",
    kl_weight=6.0,
    attack_init="gaussian",
    epochs=76,
    milestones=(75,),
    weight_decay=2e-4,
)
MART = replace(
    PGD_AT,
    name="mart",
    objective="mart",
    attack_init="gaussian",
    epochs=120,
    lr=0.01,
    milestones=(75, 90),
    weight_decay=3.5e-3,
)
AT_AWP = replace(PGD_AT, name="at-awp", awp=0.01)
TRADES_AWP = replace(
    TRADES, name="trades-awp", awp=0.005, awp_warmup=10.0, epochs=200, milestones=(100, 150), weight_decay=5e-4
)

_NAMED = (
    (GCAT, "our economical GCAT: one draw a step, averaged weights"),
    (replace(GCAT, name="gcat-mart", objective="mart"), "the same with MART's loss"),
    (replace(GCAT, name="gcat-awp", objective="mart", awp=0.005), "the same with MART's loss and AWP"),
    (GCAT_PUBLISHED, "GCAT step for step as the paper's code runs it"),
    (GCAT_MART_PUBLISHED, "GCAT + MART as published, both branches corrected"),
    (replace(GCAT_MART_PUBLISHED, name="gcat-awp-published", awp=0.01), "GCAT + MART + AWP as published"),
    (STANDARD, "no attack"),
    (PGD_AT, "PGD-10 adversarial training (Madry; Rice et al.)"),
    (TRADES, "TRADES (Zhang et al.)"),
    (MART, "MART (Wang et al.)"),
    (AT_AWP, "PGD training with AWP (Wu et al.)"),
    (TRADES_AWP, "TRADES with AWP (Wu et al.)"),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe, _ in _NAMED}
DESCRIPTIONS: dict[str, str] = {recipe.name: line for recipe, line in _NAMED}
