"""``python -m compressllm``."""

from compressllm.cli.app import main

if __name__ == "__main__":
    main()
