"""`python -m modiff_trt`: the command line."""

from modiff_trt.tools.cli.entry import main

main()
