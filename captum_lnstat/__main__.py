"""``python -m captum_lnstat``: the same as the command ``captum-lnstat``."""

from captum_lnstat.cli import main

if __name__ == "__main__":
    main(prog_name="captum-lnstat")
