import sys

from allele.store.capability import main

sys.exit(main())
