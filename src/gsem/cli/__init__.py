"""The command line. Every command's options are parsed before torch is imported."""
