"""`python -m modelcall`: the command line of modelcall_assets."""

from modelcall_assets.cli.main import main

if __name__ == "__main__":
    main()
