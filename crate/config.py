"""The tables behind the flags: model variants, data sets and presets. No torch, so that `--help` answers at once."""

# One layer's compression step is Z + sign * (output matrix) (heads); what the heads and the output matrix are, the variants
# differ in. Sparsification is ISTA, in vit an MLP.
# name: (sign, heads, output matrix, sparsification, description)
VARIANT_TABLE = {
    "crate-c": (+1, "U", "U", "ISTA", "CRATE-C(onceptual), Eq. 8: Z + MSSA(Z; U), output matrix U, tied"),
    "crate-n": (-1, "U", "U", "ISTA", "CRATE-N(egative), Eq. 9: Z - MSSA(Z; U), output matrix U, tied"),
    "crate-t": (+1, "U", "U^T", "ISTA", "CRATE-T(ranspose), Eq. 10: output matrix U^T, tied"),
    "crate": (+1, "U", "W", "ISTA", "CRATE: output matrix W, learned (with bias, as released)"),
    "crate-fix": (+1, "U", "random", "ISTA", "CRATE-Fix, Table 3: output matrix random and fixed"),
    "crate-identity": (+1, "U", "I", "ISTA", "CRATE-Identity, Table 3: output matrix I"),
    "crate-e": (-1, "exact", "U", "ISTA", "CRATE-E(xact), not in the paper: the gradient step on R^c of Eq. 6"),
    "vit": (+1, "QKV", "W", "MLP", "ViT, not in the paper: a standard pre-norm transformer, MLP ratio 4"),
}

# name: (image size, channels, classes)
DATASETS = {"digits": (8, 1, 10), "fashion-mnist": (28, 1, 10), "cifar10": (32, 3, 10), "cifar100": (32, 3, 100)}
# name: (training images, validation images), known before anything is downloaded
EXAMPLES = {"digits": (1437, 360), "fashion-mnist": (60_000, 10_000), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}

# What a run is, unless a preset or a flag says otherwise. Settings of the paper; `None` is "off" or "native".
DEFAULTS = dict(
    model="crate-c", dataset="cifar10", train_subset=None, augment="none",
    image_size=None, patch_size=4, width=384, depth=12, heads=6, dropout=0.0,
    hold_out=0.0, epochs=200, batch_size=128, lr=1e-4, schedule="cosine", weight_decay=0.0, clip_norm=None, stop_at_loss=None,
    srr_reg=0.0, srr_layer="last", srr_sparsity="l0", log_srr_every=0, seed=0,
    # What the paper leaves open: ISTA's step and threshold and the softmax of the released CRATE; SRR's lambda and gamma.
    ista_beta=0.1, ista_lambda=0.1, temperature="sqrt-p", srr_lambda=0.1, srr_gamma=1.0,
)  # fmt: skip

PRESETS = {
    # Section 6: CRATE-Tiny on CIFAR-10 with the paper's augmentation; hours on a GPU.
    "paper": dict(augment="basic", log_srr_every=20),
    # The shipped 8x8 digits and a model that trains in a quarter of a minute on one CPU core.
    "laptop": dict(dataset="digits", patch_size=2, width=48, depth=4, epochs=15, lr=2e-3, batch_size=64, log_srr_every=5),
    # Real photographs on a CPU: a fixed part of Fashion-MNIST, all its 10,000 validation images, a deeper model.
    "fashion": dict(
        dataset="fashion-mnist", train_subset=2000, patch_size=7, width=48, depth=6,
        epochs=20, lr=2e-3, batch_size=64, log_srr_every=5,
    ),
}  # fmt: skip
