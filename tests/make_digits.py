"""Makes crate/digits.npz from scikit-learn's copy of the digits: `pip install scikit-learn; python tests/make_digits.py`.

Run once; scikit-learn is no dependency. 50 images of each class train, the other 1,297 validate. They are drawn in two steps,
because a fifth of each class, 360, once validated alone: the 500 are from the others.
"""

import hashlib
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
random = np.random.default_rng(0)
members = [random.permutation(np.flatnonzero(labels == c)) for c in range(10)]
shares = np.array([len(m) for m in members]) * 360 / len(labels)
counts = shares.astype(int)
largest_remainders = np.argsort(counts - shares, kind="stable")[: 360 - counts.sum()]
counts[largest_remainders] += 1
fifth = np.sort(np.concatenate([m[:n] for m, n in zip(members, counts)]))
others = np.setdiff1d(np.arange(len(labels)), fifth)

order = np.random.default_rng(0).permutation(others)
train = np.sort(np.concatenate([order[labels[order] == c][:50] for c in range(10)]))
val = np.concatenate([np.setdiff1d(others, train), fifth])

path = Path(__file__).parents[1] / "crate" / "digits.npz"
np.savez_compressed(
    path, train_images=images[train], train_labels=labels[train], val_images=images[val], val_labels=labels[val],
)  # fmt: skip
print(path, path.stat().st_size, "bytes, sha256", hashlib.sha256(path.read_bytes()).hexdigest())
