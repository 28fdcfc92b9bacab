"""Names and versions of the project's files, shared by who writes them and who reads them (docs/store-format.md)."""

STORE_FORMAT = "onceover feature store"
STORE_VERSION = 3
STORE_FOLDER_FORMAT = "onceover feature store folder"
STORE_FOLDER_VERSION = 1
EMBEDDINGS_FORMAT = "onceover embeddings"
EMBEDDINGS_VERSION = 3
RUN_FORMAT = "onceover run"
RUN_VERSION = 6
SWEEP_FORMAT = "onceover sweep"
SWEEP_VERSION = 3
RESULT_FORMAT = "onceover result"
VECTORS_FORMAT = "onceover vectors"
INDEX_FORMAT = "onceover index"
INDEX_VERSION = 1
ACTIVATIONS_FORMAT = "onceover activations"
ACTIVATIONS_VERSION = 2
BASELINES_VERSION = 2  # of kept ranks; to be raised with whatever changes what a baseline reaches
MAP_VERSION = 2  # of kept coordinates; to be raised with whatever changes them

MANIFEST = "manifest.h5"  # of a feature store that is a folder: all but what lies in its shards

# in a run folder
CONFIG = "config.yaml"
HEADS = "heads.safetensors"
HISTORY = "history.csv"
EMBEDDINGS = "embeddings.h5"
PROVENANCE = "run.json"
TOKENIZER = "tokenizer"
RESUME = "resume.pt"
FINETUNED = "finetune.json"  # encoders are trained; features of theirs and the rest of the run are still to come
ENCODERS = "encoders"
EVALUATION = "evaluation-{}"  # of a split; .md, .csv and .json
ERRORS = "errors-{}.html"  # of a split
MAP = "map-{}-{}.npz"  # of a split and a number of images: the coordinates of their t-SNE
SHUFFLED = "shuffled"  # the control's run folder
NEXT = ".next"  # what fit --force makes, until it is complete
SWAP = ".swap"  # the same, complete, on its way into the place of what it replaces

# in a sweep's folder
SWEEP = "sweep.json"
TRIALS = "trials"
WORKERS = "workers.json"  # how many share it, and its grid, while they do
RESULTS = "results.csv"
LEADERBOARD = "leaderboard.md"
BEST = "best.yaml"

CURRENT = "CURRENT"  # an index's pointer to its manifest

UNIT_NORM_TOLERANCE = 1e-3  # of an embedding's length
