"""``python -m truenorm``: the same as the ``truenorm`` command."""

from truenorm._cli import main

if __name__ == "__main__":
    main()
