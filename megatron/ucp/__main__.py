import sys

from megatron.ucp.cli import main

sys.exit(main())
