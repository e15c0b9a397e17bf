"""torchrun for several hosts: its store listens at the address that the ranks are given, not at every one.

python -m rollouts.training.bound_torchrun --rdzv-backend static --master-addr ADDRESS --master-port PORT …
"""

from rollouts.training.stores import bind_all_stores

if __name__ == "__main__":
    bind_all_stores()  # before torchrun imports the store
    from torch.distributed.run import main

    main()
