"""Numbers that the FlashKAT paper (arXiv:2505.13813) and the KAT paper (arXiv:2409.10594) print.

They are those that the paper's abstract and public notes on it quote; others are absent. Cycles that those
notes give in trillions are billions here, which the time beside them asks for. The times of
tables 2 and 3 are not an H200's: x and y, or x and two gradients, in float32 move at 250 GB/s in them.
"""

SHAPE, GROUPS = (1024, 197, 768), 8  # images, tokens, channels of tables 2, 3, 5

# Times KAT is slower in training than a ViT (figure 1), and images per second on an H200 (table 4).
SLOWER = {"tiny": 102, "small": 123, "base": 116}
THROUGHPUT = {
    "ViT": {"tiny": 8954.97, "small": 5311.71, "base": 2457.15},
    "KAT": {"tiny": 87.73, "small": 43.28, "base": 21.24},
    "FlashKAT": {"tiny": 6317.90, "small": 3741.91, "base": 1801.75},
}
ACCURACY = {  # top-1 in percent on ImageNet-1k
    "ViT": {"tiny": 72.7, "small": 78.8, "base": 79.1},
    "KAT": {"tiny": 74.6, "small": 81.2, "base": 82.3},
    "FlashKAT": {"tiny": 74.6, "small": 81.4, "base": 82.2},
}
GAP = 0.25  # of the ViT's throughput that FlashKAT is said to lack

# Kernels (tables 2 and 3): cycles, milliseconds, percent of the peak throughput. More arithmetic (2, 4, 8
# times) is said to change neither cycles nor time.
FORWARD = {"algorithm 1": {"ms": 4.96}}
BACKWARD = {
    "algorithm 1": {"cycles": 2.4e9, "ms": 1030.0, "sm": 1.97, "l1": 4.38, "l2": 5.24, "hbm": 1.01},
    "algorithm 2": {"cycles": 16.9e6, "ms": 7.33, "sm": 32.24, "l1": 34.14, "l2": 44.76, "hbm": 92.05},
}
STALLS = {  # cycles of a warp in a state for each instruction that it issues (figures 2 and 3)
    "algorithm 1": {"long_scoreboard": 981.51, "selected": 981.51 / 412},
    "algorithm 2": {"long_scoreboard": 2.31},
}
# table 5: mean absolute error and variance of the gradients of numerator (dA) and denominator (dB)
ERRORS = {
    "algorithm 1": {"dA": (8.84e-2, 1.45e-2), "dB": (9.63e-2, 8.11e-2)},
    "algorithm 2": {"dA": (8.42e-4, 1.35e-6), "dB": (9.81e-4, 1.11e-5)},
}

# table 1
NUMERATOR, DENOMINATOR = 5, 4  # degrees m and n
GRID, ORDER = 3, 3  # G intervals and splines of degree K: 204 operations for each edge, as the papers say
ACTIVATION = 14  # operations of one value of GELU or SiLU, about

# parameters, and operations for one token: i channels before, o behind, A operations of an activation
FORMULAS = {
    "MLP": ("i o + o", "2 i o + A o"),
    "KAN": ("i o (G + K + 3) + o", "i o (9 K (G + 1.5 K) + 2 G - 2.5 K + 3) + A i"),
    "GR-KAN": ("i o + o + m + 1 + n g", "2 i o + (2 m + 2 n + 3) i"),
}
SYMBOLS = (
    f"A layer maps i channels to o channels. m = {NUMERATOR} and n = {DENOMINATOR} are the degrees, and "
    f"g = {GROUPS} groups share one numerator. G = {GRID} is the number of intervals and K = {ORDER} the "
    f"degree of the splines, so an edge takes 204 operations. A = {ACTIVATION} is the number of operations "
    f"of an activation."
)

MODELS = {  # table 6
    "tiny": {"layers": 12, "hidden": 192, "mlp": 768, "heads": 3, "parameters": 5.7e6},
    "small": {"layers": 12, "hidden": 384, "mlp": 1536, "heads": 6, "parameters": 22.1e6},
    "base": {"layers": 12, "hidden": 768, "mlp": 3072, "heads": 12, "parameters": 86.6e6},
}
PATCH_SIZE, IMAGE_SIZE = 16, 224
HYPERPARAMETERS = {  # table 7: the paper's name, its value, the name and value in a recipe
    "batch size": ("1024", {"batch_size": 1024}),
    "optimiser": ("AdamW, betas 0.9 and 0.999", {"beta1": 0.9, "beta2": 0.999}),
    "learning rate": ("0.001, cosine", {"learning_rate": 1e-3, "min_learning_rate": 0.0}),
    "weight decay": ("0.05", {"weight_decay": 0.05}),
    "epochs": ("300", {"epochs": 300}),
    "warm-up epochs": ("5", {"warmup_epochs": 5}),
    "RandAugment": ("9, 0.5", {"rand_augment": "rand-m9-mstd0.5"}),
    "mixup": ("0.8", {"mixup": 0.8}),
    "cutmix": ("1.0", {"cutmix": 1.0}),
    "random erasing": ("0.25", {"erasing": 0.25}),
    "label smoothing": ("0.1", {"label_smoothing": 0.1}),
    "weights' moving average": ("0.9999", {"ema_decay": 0.9999}),
}
DROP_PATH = {"tiny": 0.1, "small": 0.1, "base": 0.4}  # stochastic depth, table 7
