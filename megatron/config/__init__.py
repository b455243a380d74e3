"""A run as typed, frozen values, and Megatron-DeepSpeed's command line as one way to write them down.

A flag is the metadata of the dataclass field it sets, so the parser, the help text, the
table in docs/flags.md and the error messages cannot disagree with the code.

    result = parse(sys.argv[1:])            # unknown flag, wrong type: ConfigError, nothing has run yet
    result.config.validate(world_size=4)    # every problem at once, each with what to do
    print(result.config.model.hidden_size, *result.notes, sep="\n")
"""
