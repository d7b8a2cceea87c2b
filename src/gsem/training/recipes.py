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
# On digits a noise of eps keeps more clean and robust accuracy than N-FGSM's 2 eps, which is made for 8/255.
GCAT_FAST = replace(GCAT, name="gcat-fast", steps=1, attack_init="noise", noise_radius=1.0, collapse=0.5)

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

# N-FGSM with the values of de Jorge et al. (2022) for CIFAR-10 and PreActResNet-18: noise of twice eps, a step of eps,
# a rate that rises and falls along lines. Watching for catastrophic overfitting is ours.
FAST_AT = replace(
    PGD_AT,
    name="fast-at",
    model="preactresnet18",
    steps=1,
    attack_init="noise",
    epochs=30,
    lr=0.2,
    schedule="cyclic",
    milestones=(),
    warmup=15.0,
    collapse=0.5,
)
# Label smoothing and epochs of Pang et al. (2021), the average of Gowal et al. (2020) and the cycle of Rebuffi et al.
# (2021), a quarter of it for the rise.
PGD_AT_AVERAGE = replace(
    PGD_AT,
    name="pgd-at-average",
    label_smoothing=0.1,
    epochs=110,
    schedule="onecycle",
    milestones=(),
    warmup=27.5,
    nesterov=True,
    ema=0.995,
)
# TRADES with generated images as Wang et al. (2023) run it for a WideResNet-28-10 with SiLU and one million images. An
# epoch is 50,000 images long, as theirs.
TRADES_GENERATED = replace(
    PGD_AT_AVERAGE,
    name="trades-generated",
    model="wideresnet28x10-silu",
    extra_share=0.7,
    objective="trades",
    kl_weight=5.0,
    epochs=400,
    steps_per_epoch=98,
    batch_size=512,
    lr=0.2,
    warmup=10.0,
)

_NAMED = (
    (GCAT, "our economical GCAT: one draw a step, averaged weights"),
    (replace(GCAT, name="gcat-mart", objective="mart"), "the same with MART's loss"),
    (replace(GCAT, name="gcat-awp", objective="mart", awp=0.005), "the same with MART's loss and AWP"),
    (GCAT_FAST, "GCAT with a single attack step from noise, at a third of the passes"),
    (GCAT_PUBLISHED, "GCAT step for step as the paper's code runs it"),
    (GCAT_MART_PUBLISHED, "GCAT + MART as published, both branches corrected"),
    (replace(GCAT_MART_PUBLISHED, name="gcat-awp-published", awp=0.01), "GCAT + MART + AWP as published"),
    (STANDARD, "no attack"),
    (PGD_AT, "PGD-10 adversarial training (Madry; Rice et al.)"),
    (TRADES, "TRADES (Zhang et al.)"),
    (MART, "MART (Wang et al.)"),
    (AT_AWP, "PGD training with AWP (Wu et al.)"),
    (TRADES_AWP, "TRADES with AWP (Wu et al.)"),
    (FAST_AT, "single-step training from noise, N-FGSM (de Jorge et al.)"),
    (PGD_AT_AVERAGE, "PGD training, one cycle, label smoothing, averaged weights"),
    (TRADES_GENERATED, "TRADES with generated images (Wang et al.): needs --extra-data FILE.npz"),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe, _ in _NAMED}
DESCRIPTIONS: dict[str, str] = {recipe.name: line for recipe, line in _NAMED}
