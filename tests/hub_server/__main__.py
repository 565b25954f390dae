"""`python -m tests.hub_server`: the local Hub by hand, until Ctrl-C."""

import argparse
import signal
import sys

from . import LocalHub

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__).parse_args()
    # Ctrl-C is the way out, also where a shell starts this in the background and has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with LocalHub() as hub:
        # HF_HOME keeps what is fetched, and the token, apart from those of the real Hub.
        sys.stdout.write(
            "A Hub in memory, until Ctrl-C; nothing is kept. In another shell:\n"
            f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={hub.token} HF_HOME=$(mktemp -d) HF_HUB_DISABLE_XET=1\n"
            "unset HF_HUB_OFFLINE\n"
            f"hf-rgm push my-synset {hub.user}/my-synset\n"
        )
        sys.stdout.flush()
        try:
            signal.pause()
        except KeyboardInterrupt:
            sys.stdout.write("Stopped.\n")
