"""Makes crate/digits.npz from scikit-learn's copy of the digits: `pip install scikit-learn; python tests/make_digits.py`.

Run once; scikit-learn is no dependency. The split is stratified: of each class a fifth, at random, validates (360 of 1,797).
"""

import hashlib
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

VALIDATION = 360

digits = load_digits()
images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
random = np.random.default_rng(0)
members = [random.permutation(np.flatnonzero(labels == c)) for c in range(10)]
shares = np.array([len(m) for m in members]) * VALIDATION / len(labels)
counts = shares.astype(int)
largest_remainders = np.argsort(counts - shares, kind="stable")[: VALIDATION - counts.sum()]
counts[largest_remainders] += 1
validation = np.sort(np.concatenate([m[:n] for m, n in zip(members, counts)]))
training = np.setdiff1d(np.arange(len(labels)), validation)

path = Path(__file__).parents[1] / "crate" / "digits.npz"
np.savez_compressed(
    path, train_images=images[training], train_labels=labels[training],
    val_images=images[validation], val_labels=labels[validation],
)  # fmt: skip
print(path, path.stat().st_size, "bytes, sha256", hashlib.sha256(path.read_bytes()).hexdigest())
