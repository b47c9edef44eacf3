"""keras.io's "Text classification with Transformer" with one line changed: the attention layer.

    KERAS_BACKEND=jax python examples/keras_imdb.py --mechanism efficient --data aclImdb_v1.tar.gz

The example is by Apoorv Nandan (https://keras.io/examples/nlp/text_classification_with_transformer/, Apache-2.0). The
line that differs is marked below. ``key_dim`` is the width of one head here, as in the papers, where keras.io's example
gives every head the full width.

Without ``--data`` Keras downloads its own encoding of the reviews (IMDB, Maas et al. 2011). With it, the reviews are
read from ``imdb.npz`` in Keras' layout, or from the official archive or folder (which needs the extra ``experiments``).
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from better_attention.keras import MultiHeadAttention

Split = tuple[list[list[int]], np.ndarray]


class TransformerBlock(layers.Layer):
    """Attention and a small network, each with a residual and a normalisation after it."""

    def __init__(self, embed_dim, num_heads, ff_dim, maxlen, mechanism="standard", rate=0.1):
        super().__init__()
        # The line that differs; it was layers.MultiHeadAttention(num_heads=num_heads, key_dim=embed_dim).
        self.att = MultiHeadAttention(num_heads, embed_dim // num_heads, **attention_options(mechanism, maxlen))
        self.ffn = keras.Sequential([layers.Dense(ff_dim, activation="relu"), layers.Dense(embed_dim)])
        self.layernorm1 = layers.LayerNormalization(epsilon=1e-6)
        self.layernorm2 = layers.LayerNormalization(epsilon=1e-6)
        self.dropout1 = layers.Dropout(rate)
        self.dropout2 = layers.Dropout(rate)

    def call(self, inputs):
        """(batch, maxlen, embed_dim) to the same shape."""
        attn_output = self.att(inputs, inputs)
        attn_output = self.dropout1(attn_output)
        out1 = self.layernorm1(inputs + attn_output)
        ffn_output = self.ffn(out1)
        ffn_output = self.dropout2(ffn_output)
        return self.layernorm2(out1 + ffn_output)


class TokenAndPositionEmbedding(layers.Layer):
    """The sum of an embedding of the word and one of its position."""

    def __init__(self, maxlen, vocab_size, embed_dim):
        super().__init__()
        self.token_emb = layers.Embedding(input_dim=vocab_size, output_dim=embed_dim)
        self.pos_emb = layers.Embedding(input_dim=maxlen, output_dim=embed_dim)

    def call(self, x):
        """Word numbers (batch, maxlen) to vectors (batch, maxlen, embed_dim)."""
        maxlen = ops.shape(x)[-1]
        positions = ops.arange(start=0, stop=maxlen, step=1)
        return self.token_emb(x) + self.pos_emb(positions)


def attention_options(mechanism: str, maxlen: int) -> dict[str, object]:
    """The mechanism, and for one with W_A the length that W_A is made for."""
    aligned = "super" in mechanism or "align" in mechanism
    return {"mechanism": mechanism, "max_len": maxlen} if aligned else {"mechanism": mechanism}


def build_model(
    mechanism="standard", vocab_size=20_000, maxlen=200, embed_dim=32, num_heads=2, ff_dim=32, units=20, outputs=2
):
    """The example's classifier; ``units=6, outputs=1, maxlen=32, num_heads=4`` are the paper's (arXiv 2403.01643)."""
    inputs = layers.Input(shape=(maxlen,))
    x = TokenAndPositionEmbedding(maxlen, vocab_size, embed_dim)(inputs)
    x = TransformerBlock(embed_dim, num_heads, ff_dim, maxlen, mechanism)(x)
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dropout(0.1)(x)
    x = layers.Dense(units, activation="relu")(x)
    x = layers.Dropout(0.1)(x)
    x = layers.Dense(outputs, activation="softmax" if outputs > 1 else "sigmoid")(x)
    model = keras.Model(inputs=inputs, outputs=x)
    loss = "sparse_categorical_crossentropy" if outputs > 1 else "binary_crossentropy"
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return model


def load(data: Path | None, vocab_size: int) -> tuple[Split, Split]:
    """Training and test reviews as lists of word numbers, and their labels (0 negative, 1 positive)."""
    if data is None or data.suffix == ".npz":
        path = "imdb.npz" if data is None else str(data.resolve())
        return keras.datasets.imdb.load_data(path=path, num_words=vocab_size)
    try:
        from better_attention.lab.data.published import imdb
    except ImportError as error:
        raise SystemExit(f"reading {data} needs pip install 'better-attention[experiments]' ({error})") from error
    files = imdb.locate(data)
    if files is None:
        raise SystemExit(f"{data} holds no reviews: expected imdb.npz, {imdb.LAYOUT}")
    texts = imdb.read(files)
    numbers = vocabulary(texts.train_texts, vocab_size)

    def encoded(reviews: list[str]) -> list[list[int]]:
        return [[1, *(numbers.get(word, 2) for word in words(review))] for review in reviews]

    return (encoded(texts.train_texts), texts.train_labels), (encoded(texts.test_texts), texts.test_labels)


def words(review: str) -> list[str]:
    """The words of a review, in lower case, without tags."""
    return re.findall(r"[a-z0-9']+", re.sub(r"<[^>]*>", " ", review.lower()))


def vocabulary(reviews: list[str], size: int) -> dict[str, int]:
    """Numbers of the most frequent words; as in Keras' encoding 0 is padding, 1 the start and 2 any other word."""
    counts = Counter(word for review in reviews for word in words(review))
    return {word: number for number, (word, _) in enumerate(counts.most_common(size - 3), 3)}


def some(split: Split, maxlen: int, samples: int | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A split as arrays, each review cut to its last ``maxlen`` words; all of it, or some samples in random order."""
    reviews, labels = split
    order = rng.permutation(len(reviews))[:samples]
    padded = keras.utils.pad_sequences([reviews[i] for i in order], maxlen=maxlen)
    return padded, np.asarray(labels)[order]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train the classifier and report its accuracy on the test split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanism", default="standard", help="standard, optimised, efficient, super, expressive ...")
    parser.add_argument("--data", type=Path, help="imdb.npz, or the official archive or folder")
    parser.add_argument("--epochs", type=int, help="default: 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paper", action="store_true", help="the paper's setting: 32 words, 4 heads, 10 epochs of 64")
    parser.add_argument("--smoke", action="store_true", help="256 reviews and one epoch, to see that it runs")
    options = parser.parse_args(arguments)

    keras.utils.set_random_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    sizes = {"maxlen": 32, "num_heads": 4, "units": 6, "outputs": 1} if options.paper or options.smoke else {}
    model = build_model(options.mechanism, **sizes)
    train, test = load(options.data, vocab_size=20_000)
    samples = 256 if options.smoke else None
    (x_train, y_train), (x_test, y_test) = (some(split, model.input_shape[1], samples, rng) for split in (train, test))
    model.fit(
        x_train,
        y_train,
        batch_size=64 if options.paper else 32,
        epochs=options.epochs or (1 if options.smoke else 10 if options.paper else 2),
        validation_data=(x_test, y_test),
        verbose=2,
    )
    loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"{options.mechanism}: {model.count_params():,} parameters, test accuracy {accuracy:.4f}, loss {loss:.4f}")
    return {"accuracy": accuracy, "loss": loss, "parameters": model.count_params()}


if __name__ == "__main__":
    main()
