"""The same as `selfpref train`:

python examples/train.py --config-name dpo model.restore_from_path=DIR data.train_path=[pairs.jsonl]
"""

import sys

from nemo_selfpref.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
