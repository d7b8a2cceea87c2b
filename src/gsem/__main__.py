from gsem.cli.main import script

script()
