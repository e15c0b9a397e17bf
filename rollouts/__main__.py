"""`python -m rollouts CONFIG` is `deploy CONFIG`."""

from deploy import main

main()
