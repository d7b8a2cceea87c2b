from gsem.cli import script

script()
